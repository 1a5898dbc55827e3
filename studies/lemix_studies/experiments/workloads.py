"""The items of a setting: a function of the setting and the lengths alone, so that all policies get the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt
from random import Random
from statistics import fmean, pstdev
from typing import Final

from lemix_coordinator.scheduling.work import Work
from lemix_studies.experiments import arrivals
from lemix_studies.experiments.lengths import Row, around_the_mean, drawn_lengths, in_random_order, ordered
from lemix_studies.experiments.settings import Setting

DRAWN_ROWS: Final = 2_865
"""As many as the paper's texts have."""
FORGETFULNESS: Final = 0.5
"""Of `adaptive` selection: what a length counts, beside how much has been trained already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What workloads are made of."""

    rows: tuple[Row, ...] = ()
    """Lengths to take; none: they are drawn."""
    trace_s: tuple[float, ...] = ()
    """Arrivals of a trace."""
    context_lengths: Mapping[str, int]
    """Of each model, in tokens; longer rows are cut to it."""
    model_folder: str | None = None
    """Of the model that computes, where one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is submitted."""

    requests: tuple[Work, ...]
    """In order of arrival."""
    training: tuple[Work, ...]
    """In order of their release, all of them there from the beginning."""
    capped: int
    """Rows that were longer than the model's context."""
    unselected: int
    """Examples that are not trained."""


def workload_of(setting: Setting, sources: Sources) -> Workload:
    """The same for equal settings: lengths, kinds and arrivals each have randomness of their own."""
    rows = list(sources.rows) or drawn_lengths(DRAWN_ROWS, _randomness(setting, "rows"))
    limit = sources.context_lengths[setting.model]
    number = setting.items * setting.rows
    lengths = _randomness(setting, "lengths")
    taken = (
        in_random_order(rows, number, lengths)
        if setting.sigma is None
        else around_the_mean(rows, number, setting.sigma, lengths)
    )
    batches = [tuple(taken[at : at + setting.rows]) for at in range(0, number, setting.rows)]
    items = ordered(batches, setting.length_order)
    is_request = _requests(setting)
    trained = [at for at in range(setting.items) if not is_request[at]]
    selected = set(_selected(setting, trained, [_tokens(items[at]) for at in trained]))
    times = iter(_times(setting, sum(is_request), sources.trace_s))
    requests = [
        _request(at, items[at], setting, next(times), limit) for at in range(setting.items) if is_request[at]
    ]
    training = [
        Work(
            item=f"example-{at:05d}",
            number=at,
            kind="train",
            lengths=tuple(min(row.tokens, limit) for row in items[at]),
            arrived_at=0.0,
        )
        for at in trained
        if at in selected
    ]
    return Workload(
        requests=tuple(requests),
        training=tuple(training),
        capped=sum(row.tokens > limit for item in items for row in item),
        unselected=len(trained) - len(training),
    )


def _randomness(setting: Setting, purpose: str) -> Random:
    return Random(f"{setting.seed} {purpose}")


def _requests(setting: Setting) -> list[bool]:
    """Which items are requests: int((1 - r) · T) of them, at random."""
    number = int((1 - setting.training_rate) * setting.items + 1e-9)
    chosen = set(_randomness(setting, "kinds").sample(range(setting.items), number))
    return [at in chosen for at in range(setting.items)]


def _times(setting: Setting, number: int, trace_s: Sequence[float]) -> list[float]:
    randomness = _randomness(setting, "arrivals")
    match setting.arrivals:
        case "poisson":
            return arrivals.poisson(number, setting.rate, randomness)
        case "alternating":
            return arrivals.alternating(number, setting.rate, randomness)
        case "trace":
            return arrivals.as_traced(number, setting.rate, trace_s)
        case "all":
            return [0.0] * number


def _request(at: int, rows: Sequence[Row], setting: Setting, arrived_at: float, limit: int) -> Work:
    if setting.task == "score":
        return Work(
            item=f"request-{at:05d}",
            number=at,
            kind="score",
            lengths=tuple(min(row.tokens, limit) for row in rows),
            arrived_at=arrived_at,
        )
    row = rows[0]
    new_tokens = min(max(row.reference, 1), limit - 1)
    return Work(
        item=f"request-{at:05d}",
        number=at,
        kind="generate",
        lengths=(min(max(row.query, 1), limit - new_tokens),),
        arrived_at=arrived_at,
        new_tokens=new_tokens,
    )


def _tokens(rows: Sequence[Row]) -> int:
    return max(row.tokens for row in rows)


def _selected(setting: Setting, trained: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The examples that are trained (the prototype's older drop; its rules by losses need a model).

    `adaptive` trains an example with a probability that is higher near the mean length and falls as training goes on.
    """
    number = round(setting.selection_ratio * len(trained))
    match setting.selection:
        case "":
            return list(trained)
        case "first":
            return list(trained[:number])
        case "last":
            return list(trained[len(trained) - number :])
        case "random":
            return _randomness(setting, "selection").sample(trained, number)
        case "length":
            return [at for _, at in sorted(zip(tokens, trained, strict=True))[:number]]
        case "adaptive":
            randomness = _randomness(setting, "selection")
            mean, deviation = (fmean(tokens), pstdev(tokens)) if tokens else (0.0, 0.0)
            densities = [_normal(length, mean, deviation) for length in tokens]
            return [
                at
                for step, (at, density) in enumerate(zip(trained, densities, strict=True))
                if FORGETFULNESS * density + (1 - FORGETFULNESS) * (1 - step / len(trained))
                > randomness.random()
            ]


def _normal(value: float, mean: float, deviation: float) -> float:
    if deviation <= 0:
        return 0.0
    return exp(-0.5 * ((value - mean) / deviation) ** 2) / (deviation * sqrt(2 * pi))
