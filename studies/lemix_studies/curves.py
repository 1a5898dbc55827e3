"""How losses and latencies went over the time of a run: series of points, ready to be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from lemix import Generation, Score
from lemix_studies.measures import ItemTimes, percentile
from lemix_studies.replay import Outcome

Point = tuple[float, float]
"""(seconds since the first submission, value)."""
_MOST_BINS = 24
_POINTS_A_BIN = 12
_FEWEST_IN_BIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurves:
    """What training and serving made of the text."""

    steps: Sequence[Point]
    """The mean loss of each committed step, when its examples were done."""
    versions: Sequence[tuple[float, str]]
    """The weights' version from each of these moments on."""
    scores: Sequence[Point]
    """The loss of each scored request."""
    matches: Sequence[Point]
    """Of each generation: 1 if it is what was expected, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCurve:
    """One of a request's times."""

    name: str
    points: Sequence[Point]
    idle_s: float
    """What it is on an idle node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """What happened in a stretch of time."""

    t: float
    p50: float
    p95: float


def started_at(items: Sequence[ItemTimes]) -> float:
    """The first submission: the zero of a report's clock."""
    return min((item.submitted for item in items if item.submitted is not None), default=0.0)


def exact_matches(outcome: Outcome) -> dict[str, float]:
    """Of each generation that is done: 1.0 if its tokens are those that followed in the text, else 0.0."""
    return {
        item: float(answer.tokens == outcome.arrivals[item].reference)
        for item, answer in outcome.answers.items()
        if isinstance(answer, Generation)
    }


def loss_curves(outcome: Outcome) -> LossCurves:
    """Of a run's steps and answers."""
    zero = started_at(outcome.items)
    ended = {item.item: item.ended - zero for item in outcome.items if item.ended is not None}
    scores = {item: answer.loss for item, answer in outcome.answers.items() if isinstance(answer, Score)}
    steps = [
        (max(ended[example] for example in step.items), step.loss)
        for step in outcome.steps
        if step.loss is not None and step.items and all(example in ended for example in step.items)
    ]
    return LossCurves(
        steps=steps,
        versions=_first_seen(outcome.items, zero),
        scores=_in_time(scores, ended),
        matches=_in_time(exact_matches(outcome), ended),
    )


def latency_curves(outcome: Outcome) -> list[LatencyCurve]:
    """First token, gap and response of the requests, those of them that there are."""
    zero, idle = started_at(outcome.items), outcome.idle
    requests = [item for item in outcome.items if item.kind != "train" and item.submitted is not None]
    submitted = {item.item: item.submitted - zero for item in requests if item.submitted is not None}
    first = {item.item: item.ttft_s for item in requests if item.ttft_s is not None}
    responses = {item.item: item.response_s for item in requests if item.response_s is not None}
    gaps = [(now - zero, now - before) for item in requests for before, now in pairwise(item.token_times)]
    scored = [item for item in requests if item.kind == "score"]
    curves = [
        LatencyCurve(name="time to first token", points=_in_time(first, submitted), idle_s=idle.ttft_s),
        LatencyCurve(name="between tokens", points=sorted(gaps), idle_s=idle.itl_s),
        LatencyCurve(
            name="response",
            points=_in_time(responses, submitted),
            idle_s=idle.slo_base_s if len(scored) == len(requests) else 0.0,
        ),
    ]
    return [curve for curve in curves if curve.points]


def running_mean(points: Sequence[Point], num_points: int) -> list[Point]:
    """At each point, the mean of the last so many."""
    return [
        (t, fmean(value for _, value in points[max(0, number + 1 - num_points) : number + 1]))
        for number, (t, _) in enumerate(points)
    ]


def binned(points: Sequence[Point]) -> list[Bin]:
    """Percentiles in equal stretches of time, in the middle of each that has enough points; none of a few points."""
    num_bins = min(len(points) // _POINTS_A_BIN, _MOST_BINS)
    if num_bins <= 1:
        return []
    first, last = points[0][0], points[-1][0]
    width = (last - first) / num_bins or 1.0
    values: list[list[float]] = [[] for _ in range(num_bins)]
    for t, value in points:
        values[min(int((t - first) / width), num_bins - 1)].append(value)
    return [
        Bin(
            t=first + (number + 0.5) * width,
            p50=percentile(sorted(some), 50),
            p95=percentile(sorted(some), 95),
        )
        for number, some in enumerate(values)
        if len(some) >= _FEWEST_IN_BIN
    ]


def _first_seen(items: Iterable[ItemTimes], zero: float) -> list[tuple[float, str]]:
    """When a request was first answered with each version of the weights."""
    answered = sorted(
        (item.ended - zero, item.weights_version)
        for item in items
        if item.kind != "train" and item.ended is not None and item.weights_version
    )
    first: dict[str, float] = {}
    for t, version in answered:
        first.setdefault(version, t)
    return [(t, version) for version, t in first.items()]


def _in_time(values: Mapping[str, float], times: Mapping[str, float]) -> list[Point]:
    return sorted((times[item], value) for item, value in values.items() if item in times)
