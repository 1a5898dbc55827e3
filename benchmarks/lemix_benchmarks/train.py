"""Training speed: a cluster of two stages beside `torch.distributed.pipelining`, each with two computing processes.

Both train the same model on the same steps, of 16 examples in 8 microbatches, with AdamW and a thread a process.

======  ================================================================================================================
case    a step's examples
======  ================================================================================================================
fixed   64 random tokens each, so nobody pads
gsm8k   of GSM8K, as long as they are; put together by length, as long as the batch's longest where one must pad
======  ================================================================================================================

`lemix` is a whole cluster, with its other processes beside the two. Its time is from the moment the first step is
planned to the end of the last one's optimizer on both stages: what lies between two steps, the broker's and the
coordinator's part, counts. So do the peer's optimizers; its making of tensors doesn't.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from lemix import Client
from lemix.running import running_cluster
from lemix_benchmarks.batches import (
    Batch,
    Train,
    by_length,
    dealt,
    made_up_batches,
    padding_share,
    real_tokens,
    sampled_rows,
)
from lemix_benchmarks.model import BENCH_MODEL, VOCABULARY, write_bench_model
from lemix_benchmarks.pipelining import Pipeline, running_pipeline
from lemix_benchmarks.report import Findings, Plan, Row, Skipped, Subject, Target, measure, ratio
from lemix_benchmarks.training_cluster import ClusterTrainer
from lemix_common.broker import connect
from lemix_common.errors import ClusterError
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import open_model

FIXED, GSM8K = "fixed", "gsm8k"
LEMIX, PEER = "lemix", "torch_pipelining"
ROWS: Final = Path(__file__).parents[3] / "shared/data/text/gsm8k_train.jsonl"
SAMPLE: Final = 304
"""Of which the 288 shortest remain: 18 steps."""
STAGES: Final = 2
MICROBATCHES: Final = 8
EXAMPLES: Final = 16
TOKENS: Final = 64
TOLERANCE: Final = 1e-3
"""Of a step's loss: who differs by more hasn't done the same work."""
FIXED_LIMIT: Final = 1.0
REAL_SHARE: Final = 0.95
"""Of what leaving out the padding could gain."""
_UNIT: Final = "tokens/s"
_WARM_UPS: Final = 1
_NEVER: Final = 10**9
_ONE_GPU: Final = "its processes pass tensors by NCCL, which takes a GPU for each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much a run measures."""

    fixed_rounds: int
    fixed_steps: int
    """Of each round."""
    gsm8k_rounds: int
    gsm8k_steps: int


FULL: Final = Size(fixed_rounds=7, fixed_steps=4, gsm8k_rounds=6, gsm8k_steps=3)
QUICK: Final = Size(fixed_rounds=3, fixed_steps=1, gsm8k_rounds=2, gsm8k_steps=1)
"""Of the shortest batches of GSM8K."""


@dataclass(eq=False)
class Contestant:
    """A subject, and the losses of its steps so far."""

    name: str
    train: Train
    losses: list[float] = field(default_factory=list)

    def subject(self, case: str, rounds: Sequence[Sequence[Batch]]) -> Subject:
        """Train on the next round's steps each time; measures real tokens per second."""
        left = iter(rounds)

        def once() -> float:
            batches = next(left)
            trained = self.train(batches)
            self.losses += trained.losses
            return real_tokens(batches) / trained.seconds

        return Subject(case, self.name, once, unit=_UNIT)


def run(plan: Plan) -> Findings:
    """Measure both cases, in rounds."""
    size = QUICK if plan.quick else FULL
    with tempfile.TemporaryDirectory(prefix="lemix-bench-") as directory:
        folder = write_bench_model(Path(directory) / plan.model)
        gsm8k = gsm8k_rounds(folder, size, plan.seed) if ROWS.is_file() else []
        with _contestants(folder, Path(directory), plan) as contestants:
            rows = _measure(contestants, FIXED, fixed_rounds(size, plan.seed), warm_ups=_WARM_UPS)
            difference = largest_difference(contestants)
            rows += _measure(contestants, GSM8K, gsm8k, warm_ups=0) if gsm8k else ()
    return findings(rows, difference, padding_share([batch for batches in gsm8k for batch in batches]))


def findings(rows: Sequence[Row], difference: float, padding: float) -> Findings:
    """The ratios of what was measured, and what they must be."""
    limits = {FIXED: FIXED_LIMIT, GSM8K: REAL_SHARE / (1 - padding)}
    measured = [case for case in limits if any(row.case == case for row in rows)]
    has_peer = any(row.subject == PEER for row in rows)
    ratios = {case: ratio(rows, case, LEMIX, PEER) for case in measured} if has_peer else {}
    reason = f"there is no {ROWS.name} in ../shared/data/text"
    return Findings(
        rounds=len(rows[0].samples),
        threads=1,
        model=BENCH_MODEL,
        rows=tuple(rows),
        ratios=ratios,
        targets=tuple(Target(case, ratios[case], ">=", limits[case]) for case in ratios),
        skipped=(
            *(
                Skipped(case, subject, reason)
                for case in limits.keys() - set(measured)
                for subject in (LEMIX, PEER)
            ),
            *(Skipped(case, PEER, _ONE_GPU) for case in measured if not has_peer),
        ),
        further={"max_loss_difference": difference, "padding_share": padding},
    )


def fixed_rounds(size: Size, seed: int) -> list[list[Batch]]:
    """The steps of each round, warm-ups first."""
    batches = made_up_batches(seed, examples=EXAMPLES, tokens=TOKENS, vocabulary=VOCABULARY)
    return [list(islice(batches, size.fixed_steps)) for _ in range(_WARM_UPS + size.fixed_rounds)]


def gsm8k_rounds(folder: Path, size: Size, seed: int) -> list[tuple[Batch, ...]]:
    """The steps of each round, in the model's tokens: of one sample, each once."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batches = by_length(sampled_rows(ROWS, tokenizer, count=SAMPLE, seed=seed), EXAMPLES)
    return dealt(batches[: size.gsm8k_rounds * size.gsm8k_steps], size.gsm8k_rounds)


def largest_difference(contestants: Sequence[Contestant]) -> float:
    """Between the losses of the same step; `ClusterError` if it shows that the work wasn't the same."""
    if len(contestants) == 1:
        return 0.0
    ours, theirs = (contestant.losses for contestant in contestants)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if not difference <= TOLERANCE:
        raise ClusterError(f"the losses of the same step differ by {difference:.2g}: {ours} and {theirs}")
    return difference


def _measure(
    contestants: Sequence[Contestant], case: str, rounds: Sequence[Sequence[Batch]], *, warm_ups: int
) -> tuple[Row, ...]:
    subjects = [contestant.subject(case, rounds) for contestant in contestants]
    return measure(subjects, rounds=len(rounds) - warm_ups, warm_ups=warm_ups)


@contextmanager
def _contestants(folder: Path, directory: Path, plan: Plan) -> Iterator[list[Contestant]]:
    settings = ClusterSettings(
        model=str(folder),
        stages=STAGES,
        step_examples=EXAMPLES,
        microbatches=MICROBATCHES,
        schedule="zero-bubble",
        virtual_shards=1,  # there is one node, so nothing is shared out
        publish_every=_NEVER,  # the peer serves nobody either
        checkpoint_every=_NEVER,
        seed=plan.seed,
        device=plan.device,
    )
    pipeline = Pipeline(
        folder=folder,
        layers=cut_model(open_model(folder), STAGES),
        microbatches=MICROBATCHES,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    with ExitStack() as stack:
        peers = []
        if plan.device == "cpu":
            peers.append(Contestant(PEER, stack.enter_context(running_pipeline(pipeline, directory))))
        url = stack.enter_context(running_cluster(settings, data_dir=directory / "data"))
        client = stack.enter_context(Client(url))
        yield [Contestant(LEMIX, ClusterTrainer(client, connect(url), STAGES).train), *peers]
