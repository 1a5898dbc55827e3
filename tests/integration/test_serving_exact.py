"""Serving through a running cluster: what it answers is what the whole transformers model says, however it is cut."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from clusters import InProcessCluster, fresh_broker, in_process_cluster
from devices import within
from lemix import Chunk, Client, Future, GenerateItem, Generation
from lemix.connection import connection_over
from lemix_common.clock import wait_until
from lemix_common.errors import ItemCancelled, ItemFailed
from lemix_common.sampling import GREEDY, Sampling
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_stage_worker import forwarding
from lemix_stage_worker.model.sampling import Choice, Chooser, choose_tokens
from numerics.subjects import GENERATED, REAL_MODELS, TRAINED, random_tensors, write_model
from references import assert_tokens_equal, score_whole, whole_model, write_number_tokenizer

SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
CONTEXT = 256
ANSWER_S = 20
SUBJECTS = [*("llama", "gpt2"), *(pytest.param(name, marks=pytest.mark.data) for name in TRAINED)]


@dataclass(frozen=True)
class Served:
    """A model served by a cluster, and the whole of it."""

    name: str
    whole: PreTrainedModel
    cluster: InProcessCluster
    client: Client

    @property
    def vocab_size(self) -> int:
        """Tokens there are."""
        return int(self.whole.config.vocab_size)


@pytest.fixture(scope="module", params=SUBJECTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    name = str(request.param)
    if name in TRAINED:
        if not (REAL_MODELS / name).is_dir():
            pytest.skip(f"{REAL_MODELS / name} is not there")
        return REAL_MODELS / name
    return _generated(name, tmp_path_factory.mktemp(name))


def _generated(name: str, folder: Path) -> Path:
    config = copy.deepcopy(GENERATED[name])
    config.max_position_embeddings = CONTEXT
    write_model(folder, config, random_tensors(config))
    return write_number_tokenizer(folder, config.vocab_size)


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow), 3],
    ids=lambda stages: f"{stages} stages",
)
def served(
    folder: Path,
    request: pytest.FixtureRequest,
    server: RunningBroker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """The model on one node of some stages."""
    settings = ClusterSettings(model=str(folder), stages=request.param, max_running=2)
    data_dir = tmp_path_factory.mktemp("data")
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, data_dir) as running:
        yield Served(folder.name, whole_model(folder), *running)


@pytest.fixture
def small(server: RunningBroker, tmp_path: Path) -> Iterator[Served]:
    """A generated Llama on one node of three stages, where two requests may run at a time."""
    folder = _generated("llama", tmp_path / "model")
    settings = ClusterSettings(model=str(folder), stages=3, max_running=2)
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, tmp_path / "data") as running:
        yield Served("llama", whole_model(folder), *running)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_generated_tokens_are_the_whole_models(served: Served, sampling: Sampling) -> None:
    """Three prompts at once, each continued as the whole model continues it."""
    draw = random.Random(3)
    prompts = [[draw.randrange(3, served.vocab_size) for _ in range(length)] for length in (1, 7, 30)]
    items = [GenerateItem(prompt, 40, sampling=sampling, ignore_eos=True) for prompt in prompts]
    answers = [future.result(ANSWER_S) for future in [served.client.submit(item) for item in items]]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (len(answer.tokens), answer.finish_reason, answer.weights_version) == (40, "length", "0.0")
        assert_tokens_equal(served.whole, prompt, answer.tokens, sampling)


@pytest.mark.parametrize("reference", [[5], [5, 6, 7], list(range(3, 50))], ids=["1 token", "3", "47"])
def test_scores_are_the_whole_models(served: Served, reference: list[int]) -> None:
    """Each reference token's log-probability, within a relative difference of 1e-6 (on the CPU, in float32)."""
    prompt = [1, 9, 4, 4, 30, 8]
    answer = served.client.score(prompt, reference, timeout=ANSWER_S)
    expected = score_whole(served.whole, prompt, reference)
    difference = sum((a - b) ** 2 for a, b in zip(answer.logprobs, expected, strict=True)) ** 0.5
    assert difference <= within(1e-6) * sum(b * b for b in expected) ** 0.5
    assert answer.loss == pytest.approx(-sum(expected) / len(expected), rel=within(1e-6))


def test_streamed_tokens_are_contiguous(served: Served) -> None:
    """Chunks follow each other without gap or overlap, and together are the answer."""
    with served.client.stream([1], 30, ignore_eos=True, timeout=ANSWER_S) as stream:
        chunks = list(stream)
    answer = stream.future.result(0)
    assert _tokens(chunks) == list(answer.tokens)
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert {chunk.weights_version for chunk in chunks} == {answer.weights_version}


def _tokens(chunks: list[Chunk]) -> list[int]:
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.index == len(tokens)
        tokens.extend(chunk.tokens)
    return tokens


def test_nothing_is_kept_of_what_ended(served: Served) -> None:
    """Once an answer is there, no stage has its cache and the broker has no entry, lease or count of it."""
    served.client.generate([1, 5], 5, timeout=ANSWER_S)
    served.client.score([1, 5], [6], timeout=ANSWER_S)
    wait_until(served.cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)
    broker = served.cluster.broker
    assert broker.client.xlen(broker.keys.work(0)) == 0
    assert broker.client.xpending(broker.keys.work(0), "stage0")["pending"] == 0
    assert broker.hash(broker.keys.versions_in_flight) == {}


@pytest.mark.data
def test_stories_begin_as_they_should(server: RunningBroker, tmp_path: Path) -> None:
    """stories260K goes on from its first id as it was trained to."""
    folder = REAL_MODELS / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    settings = ClusterSettings(model=str(folder), stages=3)
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, tmp_path) as (_, client):
        answer = client.generate([1], 60, timeout=ANSWER_S)
    assert answer.text.startswith("Once upon a time, there was a little girl named Lily.")


def test_an_answer_ends_at_the_models_end(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chosen end-of-sequence token ends the answer (and is its last token); a request may ignore it."""
    first = small.client.generate([1], 10, ignore_eos=True, timeout=ANSWER_S).tokens
    stop = first[4]
    for hosted in small.cluster.workers.values():
        assert hosted.worker is not None
        monkeypatch.setattr(hosted.worker, "stop_ids", (stop,))
    ended = small.client.generate([1], 10, timeout=ANSWER_S)
    assert (ended.tokens, ended.finish_reason) == (first[: first.index(stop) + 1], "stop")
    assert small.client.generate([1], 10, ignore_eos=True, timeout=ANSWER_S).tokens == first


def test_cancelled_requests_free_what_they_held(small: Served) -> None:
    """Cancelled while they run, requests leave no cache on any stage and their places go to those that wait."""
    running = [small.client.stream([1, 3 + i], CONTEXT - 2, ignore_eos=True) for i in range(2)]
    for stream in running:
        next(stream)
    assert [len(hosted.pulled) for hosted in small.cluster.workers.values()].count(2) == 1
    waiting = small.client.submit(GenerateItem([1, 9], 3, ignore_eos=True))
    for stream in running:
        assert small.client.cancel(stream.item_id)
        with pytest.raises(ItemCancelled):
            stream.future.result(ANSWER_S)
    assert len(waiting.result(ANSWER_S).tokens) == 3
    wait_until(small.cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)


def test_cancelling_at_any_token_leaves_nothing(small: Served) -> None:
    """A step that is on its way when its request is cancelled doesn't bring the cache back on a later stage."""
    for count in range(12):
        with small.client.stream([1, 3 + count], CONTEXT - 2, ignore_eos=True) as stream:
            for _ in range(1 + count % 4):
                next(stream)
    wait_until(small.cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)


def test_a_cancelled_item_that_waits_never_runs(small: Served) -> None:
    """An item cancelled before its turn ends as cancelled, once, without a token."""
    running = [small.client.stream([1, 3 + i], CONTEXT - 2, ignore_eos=True) for i in range(2)]
    for stream in running:
        next(stream)
    waiting = small.client.submit(GenerateItem([1, 9], 3))
    assert small.client.cancel(waiting.item_id)
    assert not small.client.cancel(waiting.item_id)
    for stream in running:
        stream.close()
    assert len(small.client.generate([1, 9], 3, ignore_eos=True, timeout=ANSWER_S).tokens) == 3
    with pytest.raises(ItemCancelled):
        waiting.result(ANSWER_S)
    broker = small.cluster.broker
    assert "started_at" not in broker.hash(broker.keys.item(waiting.item_id))


def test_submitting_an_id_again_is_no_second_item(small: Served) -> None:
    """The same id from the same or another client gets the one answer; the cluster counts one item."""
    item = GenerateItem([1, 5], 6, ignore_eos=True, item_id="again")
    broker = small.cluster.broker
    with Client(connection=connection_over(broker)) as other:
        futures: list[Future[Generation]] = [
            small.client.submit(item),
            small.client.submit(item),
            other.submit(item),
        ]
        answers = {future.result(ANSWER_S) for future in futures}
        answers.add(small.client.submit(item).result(ANSWER_S))
    assert len(answers) == 1
    assert {name: broker.hash(broker.keys.totals)[name] for name in ("submitted", "done", "open")} == {
        "submitted": "1",
        "done": "1",
        "open": "0",
    }


def test_an_item_that_cannot_be_computed_fails_alone(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last stage's compute ends that item with its reason, not those that share its iterations."""

    def choose(logits_BV: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> list[Choice]:
        if any(chooser.sampling.seed == 13 for chooser in choosers):
            raise FloatingPointError("no such luck")
        return choose_tokens(logits_BV, choosers, positions)

    monkeypatch.setattr(forwarding, "choose_tokens", choose)
    unlucky = small.client.submit(GenerateItem([1], 5, sampling=Sampling(temperature=1.0, seed=13)))
    lucky = small.client.submit(
        GenerateItem([1], 5, sampling=Sampling(temperature=1.0, seed=12), ignore_eos=True)
    )
    with pytest.raises(ItemFailed, match="no such luck"):
        unlucky.result(ANSWER_S)
    assert len(lucky.result(ANSWER_S).tokens) == 5
    wait_until(small.cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)


def test_a_failure_does_not_confuse_those_whose_tokens_are_on_their_way(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests whose choice depends on what they have had go on rightly, wherever they are when another one fails."""

    def choose(logits_BV: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> list[Choice]:
        unlucky = [at for chooser, at in zip(choosers, positions, strict=True) if chooser.sampling.seed == 13]
        if unlucky and unlucky[0] >= 6:
            raise FloatingPointError("no such luck")
        return choose_tokens(logits_BV, choosers, positions)

    monkeypatch.setattr(forwarding, "choose_tokens", choose)
    folder = _generated("llama", tmp_path / "model")
    whole, data_dir = whole_model(folder), tmp_path / "data"
    settings = ClusterSettings(model=str(folder), stages=3)
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, data_dir) as (cluster, client):
        sampling = Sampling(repetition_penalty=1.3)
        others = [GenerateItem([5, 6 + i], 60, sampling=sampling, ignore_eos=True) for i in range(4)]
        futures = [client.submit(item) for item in others]
        for index in range(4):
            unlucky = Sampling(temperature=1.0, seed=13)
            item = GenerateItem([1, 3 + index], 30, sampling=unlucky, ignore_eos=True)
            with pytest.raises(ItemFailed, match="no such luck"):
                client.submit(item).result(ANSWER_S)
        for item, future in zip(others, futures, strict=True):
            tokens = future.result(ANSWER_S).tokens
            assert len(tokens) == 60
            assert_tokens_equal(whole, [int(token) for token in item.prompt], tokens, sampling)
        wait_until(cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)
