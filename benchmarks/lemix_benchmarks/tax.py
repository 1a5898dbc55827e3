"""What training costs those who are served meanwhile, and what it gets: two stages, one model, both kinds of work.

Requests arrive at random moments (Poisson, by a seed), half as many a second as the cluster can answer when so many as
it runs at a time are kept running. Training has a backlog without end, of examples with 64 tokens. The cluster has its
default settings. A round has the same requests, at the same moments, in each case:

================  ======================================================================================================
case              what happens
================  ======================================================================================================
training_only     training alone; a sample is examples a second
serving_only      the requests alone; here and below a sample is the round's 99th percentile between two tokens
co_located        both
co_located_fifo   both, in a cluster that computes what comes in the order in which it comes (`--order fifo`)
================  ======================================================================================================

`training_share` is training's rate beside serving ÷ (what serving left of the stages' time × training's rate alone).
`blocked_p99_s` is of the times that a stage's ready serving steps waited while training ran. A safepoint comes after
each layer, so a step may wait for one on top of `max_block_ms`: `layer_backward_s` is, with training alone, the median
backward of an example on the first stage ÷ its layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from lemix import Client
from lemix_benchmarks.client_load import closed_loop, streamed
from lemix_benchmarks.decoding import NEW_TOKENS, drawn_requests, poisson_arrivals
from lemix_benchmarks.model import BENCH_MODEL, write_bench_model
from lemix_benchmarks.report import SECONDS, Findings, Plan, Row, Subject, Target, measure
from lemix_benchmarks.tenants import Measured, Tenants, running_tenants
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import open_model

TRAINING_ONLY, SERVING_ONLY = "training_only", "serving_only"
CO_LOCATED, CO_LOCATED_FIFO = "co_located", "co_located_fifo"
LEMIX: Final = "lemix"
STAGES: Final = 2
LOAD: Final = 0.5
"""Of the capacity."""
TTFT_LIMIT: Final = 1.25
BLOCKS: Final = 1.5
"""Of `max_block_ms`: what the longest gaps between tokens may grow by."""
SHARE_LIMIT: Final = 0.7
_NEVER: Final = 10**9
_RATIOS: Final = ("ttft_p50", "ttft_p95", "ttft_p99", "itl_p95", "itl_p99")


@dataclass(frozen=True, slots=True)
class Size:
    """How much a run measures."""

    rounds: int
    seconds: float
    """In which a round's requests arrive."""
    step_examples: int
    capacity_requests: int
    new_tokens: range


FULL: Final = Size(5, 30.0, 8, 64, NEW_TOKENS)
ON_GPU: Final = Size(5, 5.0, 8, 64, NEW_TOKENS)
QUICK: Final = Size(2, 3.0, 2, 24, range(4, 17))


@dataclass(eq=False)
class Case:
    """What is measured once a round, and what was."""

    name: str
    once: Callable[[int], Measured]
    """By the round's number."""
    unit: str = SECONDS
    measured: list[Measured] = field(default_factory=list)

    def subject(self) -> Subject:
        """Measure the next round each time."""

        def once() -> float:
            measured = self.once(len(self.measured))
            self.measured.append(measured)
            return measured.figure("itl_p99") if measured.ttfts_s else measured.examples_per_second

        return Subject(self.name, LEMIX, once, unit=self.unit)

    def row(self, row: Row) -> Row:
        """With its further fields, the median over the rounds of each."""
        rounds = [measured.to_fields() for measured in self.measured]
        return replace(row, further={name: median(each[name] for each in rounds) for name in rounds[0]})


def run(plan: Plan) -> Findings:
    """Measure all cases, in rounds."""
    size = QUICK if plan.quick else FULL if plan.device == "cpu" else ON_GPU
    with tempfile.TemporaryDirectory(prefix="lemix-bench-") as directory:
        folder = write_bench_model(Path(directory) / plan.model)
        settings = ClusterSettings(
            model=str(folder),
            stages=STAGES,
            step_examples=size.step_examples,
            seed=plan.seed,
            device=plan.device,
        )
        if plan.model != BENCH_MODEL:  # each version has gigabytes: the disk's time isn't what is measured
            settings = replace(settings, publish_every=_NEVER, checkpoint_every=_NEVER)
        with ExitStack() as stack:
            urgent, fifo = (
                stack.enter_context(
                    running_tenants(replace(settings, order=order), Path(directory) / order, plan.seed)
                )
                for order in ("urgency", "fifo")
            )
            for tenants in (urgent, fifo):  # warm both kinds of work
                tenants.serve(
                    drawn_requests(plan.seed, 2, new_tokens=QUICK.new_tokens), [0.0, 1.0], trains=True
                )
            capacity = requests_per_second(urgent.client, size, settings.max_running, plan.seed)
            cases = _cases(urgent, fifo, size, per_second=LOAD * capacity, seed=plan.seed)
            rows = measure([case.subject() for case in cases], rounds=size.rounds, warm_ups=0)
        layers = len(cut_model(open_model(folder), STAGES)[0])
    return findings(
        {case.name: case.measured for case in cases},
        [case.row(row) for case, row in zip(cases, rows, strict=True)],
        layers=layers,
        max_block_s=settings.max_block_ms / 1e3,
        capacity=capacity,
    )


def findings(
    measured: Mapping[str, Sequence[Measured]],
    rows: Sequence[Row],
    *,
    layers: int,
    max_block_s: float,
    capacity: float,
) -> Findings:
    """The ratios of what was measured, and what they must be; ``layers`` are those of the first stage."""
    alone = median(each.figure("itl_p99") for each in measured[SERVING_ONLY])
    layer_s = median(each for round_ in measured[TRAINING_ONLY] for each in round_.backwards_s) / layers
    ratios = _ratios(measured, CO_LOCATED)
    blocked_s, fifo_blocked_s = (
        median(each.blocked_p99_s for each in measured[case]) for case in (CO_LOCATED, CO_LOCATED_FIFO)
    )
    return Findings(
        rounds=len(measured[SERVING_ONLY]),
        threads=1,
        model=BENCH_MODEL,
        rows=tuple(rows),
        ratios=ratios | {f"fifo_{name}": value for name, value in _ratios(measured, CO_LOCATED_FIFO).items()},
        targets=(
            Target("itl_p99", ratios["itl_p99"], "<=", (alone + BLOCKS * max_block_s) / alone),
            Target("ttft_p95", ratios["ttft_p95"], "<=", TTFT_LIMIT),
            Target("blocked_p99_s", blocked_s, "<=", max_block_s + layer_s),
            Target("training_share", ratios["training_share"], ">=", SHARE_LIMIT),
        ),
        further={
            "blocked_p99_s": blocked_s,
            "fifo_blocked_p99_s": fifo_blocked_s,
            "max_block_s": max_block_s,
            "layer_backward_s": layer_s,
            "capacity_requests_per_second": capacity,
        },
    )


def _ratios(measured: Mapping[str, Sequence[Measured]], case: str) -> dict[str, float]:
    """Of a co-located case, each the median over the rounds."""
    rounds = list(zip(measured[case], measured[SERVING_ONLY], measured[TRAINING_ONLY], strict=True))
    ratios = {
        name: median(both.figure(name) / alone.figure(name) for both, alone, _ in rounds) for name in _RATIOS
    }
    return ratios | {
        "training_share": median(
            both.examples_per_second / ((1 - both.serving_share) * alone.examples_per_second)
            for both, _, alone in rounds
        )
    }


def requests_per_second(client: Client, size: Size, running: int, seed: int) -> float:
    """What the cluster answers when so many requests are kept running."""
    requests = drawn_requests(seed, size.capacity_requests, new_tokens=size.new_tokens)
    answered = closed_loop(partial(streamed, client), requests, running)
    return answered.tokens_per_second / (sum(each.new_tokens for each in requests) / len(requests))


def _cases(urgent: Tenants, fifo: Tenants, size: Size, *, per_second: float, seed: int) -> list[Case]:
    count = max(2, round(per_second * size.seconds))

    def serve(tenants: Tenants, number: int, *, trains: bool) -> Measured:
        own_seed = seed * size.rounds + number
        requests = drawn_requests(own_seed, count, new_tokens=size.new_tokens)
        return tenants.serve(
            requests, poisson_arrivals(own_seed, count, per_second=per_second), trains=trains
        )

    return [
        Case(TRAINING_ONLY, lambda _: urgent.train(size.seconds), unit="examples/s"),
        Case(SERVING_ONLY, lambda number: serve(urgent, number, trains=False)),
        Case(CO_LOCATED, lambda number: serve(urgent, number, trains=True)),
        Case(CO_LOCATED_FIFO, lambda number: serve(fifo, number, trains=True)),
    ]
