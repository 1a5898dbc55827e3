"""Rounds over a grid, and what they come to.

Every round runs every cell, the short ones several times, in an order of its own, so that what disturbs the machine for
a while disturbs no cell more than another; a cell's figure is the median of all its passes. On a processor that is the
time which the computing thread had, so that others who want the same core don't count; on a GPU it is the time that
passed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

import structlog

from lemix_stage_worker.device import device_memory_bytes, device_text
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.profiling.grid import Cell, grid
from lemix_stage_worker.profiling.hop import measure_hops
from lemix_stage_worker.profiling.subject import Subject, Took, host_stage

log = structlog.get_logger()

SCHEMA: Final = 2
_SHORT_S: Final = 0.05
_MOST_REPETITIONS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    rounds: int = 7
    """After a pass of each cell that isn't counted."""
    cache_tokens: int = 8192
    """The most tokens of a pass, and of all that it attends to."""
    is_quick: bool = False


QUICK: Final = Effort(rounds=3, cache_tokens=2048, is_quick=True)


@dataclass(frozen=True, slots=True)
class Sample:
    """A cell's figure."""

    kind: str
    tokens: int
    contexts: int
    seconds: float
    wall_s: float
    """The median of what passed by the clock on the wall."""
    each_s: tuple[float, ...]
    """What the figure is the median of."""


def measure_model(source: ModelSource, stages: int, effort: Effort, *, seed: int = 0) -> dict[str, Any]:
    """Measure every stage of a model's cut, one after the other: as JSON has it.

    A cut that the model doesn't allow is a `ModelError`.
    """
    layers = cut_model(source, stages)
    cells = grid(
        context_length=source.context_length, cache_tokens=effort.cache_tokens, quick=effort.is_quick
    )
    return {
        "schema": SCHEMA,
        "device": device_text(source.device),
        "clock": _clock(source),
        "rounds": effort.rounds,
        "memory_bytes": device_memory_bytes(source.device),
        "hops": measure_hops(source, rounds=effort.rounds),
        "stages": [
            _measure_stage(source, stage, layers, cells, effort, random.Random(seed))
            for stage in range(stages)
        ],
    }


def _measure_stage(
    source: ModelSource,
    stage: int,
    layers: tuple[range, ...],
    cells: tuple[Cell, ...],
    effort: Effort,
    order: random.Random,
) -> dict[str, Any]:
    subject = host_stage(source, stage, layers, cache_tokens=effort.cache_tokens)
    samples, optimizer_s = measure_stage(subject, cells, rounds=effort.rounds, order=order)
    trained = [cell for cell in cells if cell.kind == "train"]
    return {
        "layers": [layers[stage].start, layers[stage].stop - 1],
        "load_s": subject.load_s,
        "optimizer_s": optimizer_s,
        "weight_bytes": subject.host.template.weight_bytes,
        "training_bytes": subject.training_bytes,
        "kv_token_bytes": subject.kv_token_bytes,
        "activations": [
            {"tokens": cell.tokens, "contexts": cell.contexts, "bytes": subject.activation_bytes(cell)}
            for cell in trained
        ],
        "row_steps": subject.row_steps,
        "samples": [asdict(sample) for sample in samples],
    }


def measure_stage(
    subject: Subject, cells: tuple[Cell, ...], *, rounds: int, order: random.Random
) -> tuple[list[Sample], float]:
    """Each cell's figures, in the grid's order, and an optimizer step's seconds."""
    seconds_of = _clock_of(subject)
    warm_up = {cell: subject.run(cell) for cell in cells}
    subject.optimize()
    deck = [cell for cell in cells for _ in range(_repetitions(warm_up[cell]))]
    taken: dict[tuple[Cell, str], list[Took]] = {}
    steps: list[Took] = []
    for number in range(rounds):
        for cell in order.sample(deck, len(deck)):
            for kind, took in subject.run(cell).items():
                taken.setdefault((cell, kind), []).append(took)
        steps.append(subject.optimize())
        log.info("round_measured", stage=subject.host.stage, round=number + 1, rounds=rounds)
    samples = [
        Sample(
            kind=kind,
            tokens=cell.tokens,
            contexts=cell.contexts,
            seconds=median(map(seconds_of, taken[cell, kind])),
            wall_s=median(took.wall_s for took in taken[cell, kind]),
            each_s=tuple(map(seconds_of, taken[cell, kind])),
        )
        for cell, kind in sorted(taken, key=lambda key: (key[1], cells.index(key[0])))
    ]
    return samples, median(map(seconds_of, steps))


def _repetitions(passes: Mapping[str, Took]) -> int:
    """How often a round has a cell: what is short is disturbed more easily, and costs little."""
    return min(_MOST_REPETITIONS, math.ceil(_SHORT_S / sum(took.wall_s for took in passes.values())))


def _clock(source: ModelSource) -> str:
    return "thread" if source.device.type == "cpu" else "wall"


def _clock_of(subject: Subject) -> Callable[[Took], float]:
    if _clock(subject.host.source) == "thread":
        return lambda took: took.thread_s
    return lambda took: took.wall_s
