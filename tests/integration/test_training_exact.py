"""Training through a running cluster: the same bits for every cut and membership, and the plain loop's weights.

The rows are GSM8K's; those over the model's context are counted and left out, as the printed line says.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clusters import fresh_broker, in_process_cluster
from devices import within
from lemix import Client, TrainItem
from lemix_common.sampling import Sampling
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from numerics.subjects import GENERATED, REAL_MODELS, TRAINED, random_tensors, write_model
from references import (
    Example,
    fitting_examples,
    gsm8k_rows,
    relative_difference,
    train_whole,
    weights_sha256,
    write_number_tokenizer,
)

STEP_EXAMPLES = 4
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
LIMIT = within(1e-6)
QUICKLY = ["llama", pytest.param("gpt2", marks=pytest.mark.slow)]
"""What runs everywhere; the other family, which is cut the same way, with the slow tests."""
SUBJECTS = [
    *("llama", "gpt2"),
    pytest.param(TRAINED[0], marks=pytest.mark.data),
    *(pytest.param(name, marks=[pytest.mark.data, pytest.mark.slow]) for name in TRAINED[1:]),
]
CUT_SUBJECTS = [
    *QUICKLY,
    *(pytest.param(name, marks=[pytest.mark.data, pytest.mark.slow]) for name in TRAINED),
]


@dataclass(frozen=True)
class Cut:
    """A cluster's shape."""

    nodes: int
    stages: int

    def __str__(self) -> str:
        return f"{self.nodes} x {self.stages}"


@dataclass(frozen=True)
class Subject:
    """A model and the examples of some steps."""

    folder: Path
    examples: Sequence[Example]


@dataclass(frozen=True)
class Trained:
    """What a cluster made of a subject."""

    fingerprints: tuple[str, ...]
    """Of every node."""
    weights: dict[str, Tensor]
    num_served: int = 0


Subjects = Callable[[str, int], Subject]
Baselines = Callable[[str, int], Trained]


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """A model by name, with the rows of so many steps."""
    made: dict[tuple[str, int], Subject] = {}

    def make(name: str, steps: int) -> Subject:
        if (name, steps) not in made:
            made[name, steps] = _subject(name, steps, tmp_path_factory)
        return made[name, steps]

    return make


@pytest.fixture(scope="session")
def baseline_of(
    subject_of: Subjects, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory
) -> Baselines:
    """What one node of one stage makes of a subject."""
    made: dict[tuple[str, int], Trained] = {}

    def make(name: str, steps: int) -> Trained:
        if (name, steps) not in made:
            subject = subject_of(name, steps)
            made[name, steps] = train(server, subject, tmp_path_factory.mktemp("one"), nodes=1, stages=1)
        return made[name, steps]

    return make


def _subject(name: str, steps: int, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if name in GENERATED:
        config = GENERATED[name]
        draw = random.Random(1)
        rows = [(_ids(draw, 1, 20), _ids(draw, 1, 40)) for _ in range(steps * STEP_EXAMPLES)]
        folder = write_model(tmp_path_factory.mktemp(name), config, random_tensors(config))
        write_number_tokenizer(folder, config.vocab_size)
        return Subject(folder, [Example(*row, ids=row) for row in rows])
    folder = REAL_MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    examples, num_over_long = fitting_examples(folder, gsm8k_rows(), steps * STEP_EXAMPLES)
    print(f"{name}: {len(examples)} GSM8K rows fit the context, {num_over_long} before them don't")
    return Subject(folder, examples)


def _ids(draw: random.Random, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw.randrange(3, 61) for _ in range(draw.randint(least, most)))


def train(
    server: RunningBroker, subject: Subject, data_dir: Path, *, serving: bool = False, **settings: Any
) -> Trained:
    """Train on every example through a cluster; with ``serving`` under a stream of requests."""
    chosen = ClusterSettings(
        model=str(subject.folder),
        step_examples=STEP_EXAMPLES,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        checkpoint_every=20,
        **settings,
    )
    with fresh_broker(server) as broker, in_process_cluster(broker, chosen, data_dir) as (cluster, client):
        requests = Requests(client)
        if serving:
            requests.start()
        futures = [
            client.submit(TrainItem(example.prompt, example.reference)) for example in subject.examples
        ]
        answers = [future.result(240) for future in futures]
        num_served = requests.stop() if serving else 0
        weights = cluster.weights(0)
        fingerprints = tuple(cluster.fingerprint(node) for node in range(chosen.nodes))
    assert [answer.step for answer in answers] == [1 + i // STEP_EXAMPLES for i in range(len(answers))]
    assert fingerprints[0] == weights_sha256(weights)
    return Trained(fingerprints, weights, num_served)


class Requests:
    """A stream of score and generate requests, from two clients' threads, until told to stop."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stopped = threading.Event()
        self._ended: list[str] = []
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(2)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """End when each kind has been answered; the number of answers. An error of a request is raised here."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        for error in self._errors:
            raise error
        assert {"generate", "score"} <= set(self._ended)
        return len(self._ended)

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        kinds = ["generate", "score"]
        try:
            while not self._stopped.is_set() or kinds:
                self._ask(kinds.pop() if kinds else draw.choice(["generate", "score"]), draw)
        except Exception as error:  # noqa: BLE001 - raised again by stop
            self._errors.append(error)

    def _ask(self, kind: str, draw: random.Random) -> None:
        prompt = _ids(draw, 1, 8)
        if kind == "score":
            self._client.score(prompt, _ids(draw, 1, 8), timeout=60)
        else:
            sampling = Sampling(temperature=draw.choice([0.0, 1.0]), seed=draw.randrange(99))
            self._client.generate(prompt, draw.randint(1, 20), sampling=sampling, ignore_eos=True, timeout=60)
        self._ended.append(kind)


def _check_against_plain_loop(
    name: str, subject: Subject, trained: Trained, *, limit: float = LIMIT, **plainly: Any
) -> None:
    plain = train_whole(
        subject.folder,
        subject.examples,
        step_examples=STEP_EXAMPLES,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        **plainly,
    )
    difference = relative_difference(trained.weights, plain)
    print(
        f"{name}: relative difference to the plain loop after "
        f"{len(subject.examples) // STEP_EXAMPLES} steps: {difference:.2e}"
    )
    assert difference <= limit


@pytest.mark.parametrize("name", SUBJECTS)
def test_ten_steps_are_the_plain_loops(subject_of: Subjects, baseline_of: Baselines, name: str) -> None:
    """After 10 steps through the cluster the weights are those of a transformers and AdamW loop, within 1e-6."""
    _check_against_plain_loop(name, subject_of(name, 10), baseline_of(name, 10))


@pytest.mark.parametrize("cut", [Cut(1, 3), Cut(2, 2)], ids=str)
@pytest.mark.parametrize("name", CUT_SUBJECTS)
def test_ten_steps_end_with_the_same_bits_however_cut(
    subject_of: Subjects,
    baseline_of: Baselines,
    server: RunningBroker,
    tmp_path: Path,
    name: str,
    cut: Cut,
) -> None:
    """Stages and nodes change nothing: every node's weights have the sha256 of one node's with one stage."""
    trained = train(server, subject_of(name, 10), tmp_path, nodes=cut.nodes, stages=cut.stages)
    assert set(trained.fingerprints) == {baseline_of(name, 10).fingerprints[0]}


@pytest.mark.parametrize("name", CUT_SUBJECTS)
def test_ten_steps_are_the_same_while_serving(
    subject_of: Subjects, baseline_of: Baselines, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """A stream of requests meanwhile changes no bit of the weights."""
    trained = train(server, subject_of(name, 10), tmp_path, nodes=1, stages=2, serving=True)
    assert trained.num_served
    assert set(trained.fingerprints) == {baseline_of(name, 10).fingerprints[0]}


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_stages_that_share_a_worker_change_nothing(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, workers: int
) -> None:
    """Both nodes' stages on fewer workers, where neighbours and twins are the same process: the same bits."""
    subject = subject_of("gpt2", 10)
    alone = train(server, subject, tmp_path / "alone", nodes=1, stages=1, virtual_shards=2)
    shared = train(server, subject, tmp_path / "shared", nodes=2, stages=2, workers=workers, virtual_shards=2)
    assert set(shared.fingerprints) == set(alone.fingerprints)


# ------------------------------------------------------------------------------------------- schedules and packing
SCHEDULES = [
    pytest.param({"schedule": "gpipe", "stages": 3}, marks=pytest.mark.slow),
    {"schedule": "zero-bubble", "stages": 3},
    pytest.param({"schedule": "zero-bubble", "nodes": 2, "stages": 2}, marks=pytest.mark.slow),
    {"schedule": "interleaved", "stages": 4, "workers": 2},
    pytest.param({"schedule": "1f1b", "stages": 2, "recompute": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda settings: " ".join(map(str, settings.values())))
@pytest.mark.parametrize("name", QUICKLY)
def test_no_schedule_changes_a_bit(
    subject_of: Subjects,
    baseline_of: Baselines,
    server: RunningBroker,
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
) -> None:
    """The order of a step's work, and what of it is computed again, leave the weights as they are."""
    trained = train(server, subject_of(name, 10), tmp_path, **settings)
    assert set(trained.fingerprints) == {baseline_of(name, 10).fingerprints[0]}


@pytest.mark.parametrize("name", QUICKLY)
def test_packed_microbatches_are_the_plain_loops(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """Examples packed by a token budget: within 1e-6 of one by one, and the same bits however cut."""
    subject = subject_of(name, 10)
    packing: dict[str, Any] = {"microbatch_tokens": 64}
    alone = train(server, subject, tmp_path / "alone", nodes=1, stages=1, **packing)
    cut = train(server, subject, tmp_path / "cut", nodes=2, stages=3, schedule="zero-bubble", **packing)
    _check_against_plain_loop(name, subject, alone)
    assert set(cut.fingerprints) == set(alone.fingerprints)


@pytest.mark.parametrize("name", QUICKLY)
def test_a_pp_is_exactly_one_version_late(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """Every step on the weights before the last: the plain loop that does so, the same bits however cut and served."""
    subject = subject_of(name, 10)
    settings: dict[str, Any] = {"schedule": "a-pp"}
    alone = train(server, subject, tmp_path / "alone", nodes=1, stages=1, **settings)
    cut = train(server, subject, tmp_path / "cut", nodes=1, stages=3, serving=True, **settings)
    twins = train(server, subject, tmp_path / "twins", nodes=2, stages=2, **settings)
    _check_against_plain_loop(name, subject, alone, delay=1)
    assert set(cut.fingerprints) == set(twins.fingerprints) == set(alone.fingerprints)


@pytest.mark.parametrize("name", QUICKLY)
def test_independent_replicas_are_as_many_models(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """Each node learns its own half of every step, and nothing of the other's: the plain loop on that half."""
    subject = subject_of(name, 10)
    trained = train(server, subject, tmp_path, nodes=2, stages=2, replicas="independent")
    assert len(set(trained.fingerprints)) == 2
    steps = [
        subject.examples[start : start + STEP_EXAMPLES]
        for start in range(0, len(subject.examples), STEP_EXAMPLES)
    ]
    plain = train_whole(
        subject.folder,
        [example for step in steps for example in step[: STEP_EXAMPLES // 2]],
        step_examples=STEP_EXAMPLES // 2,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        targets_of_step=[sum(len(example.ids[1]) for example in step) for step in steps],
    )
    assert relative_difference(trained.weights, plain) <= LIMIT


# ------------------------------------------------------------------------------------------------------ number types
@pytest.mark.parametrize("name", QUICKLY)
def test_in_float64_only_float64s_rounding_is_left(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """10 steps in double precision, cut in three and packed: within 1e-8 of the plain loop."""
    subject = subject_of(name, 10)
    trained = train(server, subject, tmp_path, stages=3, dtype="float64", microbatches=2)
    assert {tensor.dtype for tensor in trained.weights.values()} == {torch.float64}
    _check_against_plain_loop(name, subject, trained, limit=1e-8, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_learns_in_float32_masters(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """Steps too small for bfloat16 add up all the same: near the plain float32 loop, and the same bits however cut."""
    subject = subject_of(name, 10)
    alone = train(server, subject, tmp_path / "alone", nodes=1, stages=1, dtype="bfloat16")
    cut = train(
        server, subject, tmp_path / "cut", nodes=2, stages=3, dtype="bfloat16", schedule="zero-bubble"
    )
    assert {tensor.dtype for tensor in alone.weights.values()} == {torch.float32}
    assert set(cut.fingerprints) == set(alone.fingerprints)
    _check_against_plain_loop(name, subject, alone, limit=3e-3)


# ------------------------------------------------------------------------------------------------- the whole claim


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.data
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_are_the_plain_loops(subject_of: Subjects, baseline_of: Baselines, name: str) -> None:
    """50 steps on GSM8K: within 1e-6 of the plain loop."""
    _check_against_plain_loop(name, subject_of(name, 50), baseline_of(name, 50))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.data
@pytest.mark.parametrize("cut", [Cut(nodes, stages) for nodes in (1, 2) for stages in (1, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_end_with_the_same_bits_however_cut(
    subject_of: Subjects,
    baseline_of: Baselines,
    server: RunningBroker,
    tmp_path: Path,
    name: str,
    cut: Cut,
) -> None:
    """50 steps on GSM8K with 1 or 2 nodes of 1, 2, 3 or 5 stages: one sha256."""
    trained = train(server, subject_of(name, 50), tmp_path, nodes=cut.nodes, stages=cut.stages)
    print(f"{name}: {cut}: {', '.join(trained.fingerprints)}")
    assert set(trained.fingerprints) == {baseline_of(name, 50).fingerprints[0]}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.data
@pytest.mark.parametrize("cut", [Cut(1, 3), Cut(2, 2)], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_are_the_same_while_serving(
    subject_of: Subjects,
    baseline_of: Baselines,
    server: RunningBroker,
    tmp_path: Path,
    name: str,
    cut: Cut,
) -> None:
    """50 steps on GSM8K under a stream of requests: the same sha256."""
    trained = train(server, subject_of(name, 50), tmp_path, nodes=cut.nodes, stages=cut.stages, serving=True)
    print(f"{name}: {cut}, {trained.num_served} requests served meanwhile")
    assert set(trained.fingerprints) == {baseline_of(name, 50).fingerprints[0]}


FIFTY = [
    {"schedule": schedule, "nodes": nodes, "stages": stages}
    for schedule in ("gpipe", "zero-bubble")
    for nodes in (1, 2)
    for stages in (1, 2, 3, 5)
] + [
    {"schedule": "interleaved", "nodes": nodes, "stages": stages, "workers": nodes}
    for nodes in (1, 2)
    for stages in (2, 3, 5)
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.data
@pytest.mark.parametrize("settings", FIFTY, ids=lambda settings: " ".join(map(str, settings.values())))
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_under_every_schedule(
    subject_of: Subjects,
    baseline_of: Baselines,
    server: RunningBroker,
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
) -> None:
    """50 steps on GSM8K in another order of work: the same sha256 (that 1f1b's cuts have it, the test above says)."""
    trained = train(server, subject_of(name, 50), tmp_path, **settings)
    print(f"{name}: {settings}: {', '.join(trained.fingerprints)}")
    assert set(trained.fingerprints) == {baseline_of(name, 50).fingerprints[0]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.data
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_in_float64(
    subject_of: Subjects, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """50 steps on GSM8K in double precision, packed, on 2 nodes of 3 stages: within 1e-8 of the plain loop."""
    subject = subject_of(name, 50)
    trained = train(server, subject, tmp_path, nodes=2, stages=3, dtype="float64", microbatches=4)
    _check_against_plain_loop(name, subject, trained, limit=1e-8, dtype=torch.float64)
