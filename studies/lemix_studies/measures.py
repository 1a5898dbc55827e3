"""The figures of a report, computed from the history alone: pure functions of values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from lemix_studies.history import END_EVENTS, HistoryEvent

SLO_FACTORS = (1, 5, 10)
GOODPUT_FACTOR = 5


@dataclass(kw_only=True)
class ItemTimes:
    """What happened to one item, by the client's clock."""

    item: str
    kind: str
    submitted: float | None = None
    accepted: float | None = None
    was_refused: bool = False
    token_times: list[float] = field(default_factory=list)
    token_indexes: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    ended: float | None = None
    weights_version: str | None = None
    predicted_end: float | None = None
    """As the coordinator wrote it down when it gave the item to a node."""

    @property
    def is_done(self) -> bool:
        return "done" in self.ends

    @property
    def response_s(self) -> float | None:
        """Submit to the end, of an item that is done."""
        if not self.is_done or self.submitted is None or self.ended is None:
            return None
        return self.ended - self.submitted

    @property
    def predicted_response_s(self) -> float | None:
        """Submit to the predicted end."""
        if self.predicted_end is None or self.submitted is None:
            return None
        return self.predicted_end - self.submitted

    @property
    def ttft_s(self) -> float | None:
        """Submit to the first token."""
        if not self.token_times or self.submitted is None:
            return None
        return self.token_times[0] - self.submitted

    @property
    def gaps_s(self) -> list[float]:
        """Between successive tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleTimes:
    """What the workload's requests take on an idle node: the base of all SLOs."""

    slo_base_s: float
    ttft_s: float
    itl_s: float


def items_of(history: Iterable[HistoryEvent]) -> dict[str, ItemTimes]:
    """Each item's events, gathered."""
    items: dict[str, ItemTimes] = {}
    for event in history:
        item = items.setdefault(event.item, ItemTimes(item=event.item, kind=event.kind))
        match event.event:
            case "submitted":
                item.submitted = event.t if item.submitted is None else item.submitted
            case "accepted":
                item.accepted = event.t
            case "refused":
                item.was_refused = True
            case "token":
                item.token_times.append(event.t)
                item.token_indexes.append(event.index if event.index is not None else -1)
            case "done" | "failed" | "cancelled" as end:
                item.ends.append(end)
                item.ended = event.t
                item.weights_version = event.weights_version
    return items


def count_lost(items: Iterable[ItemTimes], lengths: Mapping[str, int]) -> int:
    """Accepted without an end, or done without every token (``lengths``: how many a generation must have)."""
    return sum(
        (item.accepted is not None and not item.ends)
        or (item.is_done and bool(set(range(lengths.get(item.item, 0))) - set(item.token_indexes)))
        for item in items
    )


def count_duplicated(items: Iterable[ItemTimes], steps: Iterable[Sequence[str]]) -> int:
    """Items with two ends or a token twice, and examples in two committed steps."""
    in_steps = Counter(example for step in steps for example in step)
    twice = {example for example, times in in_steps.items() if times > 1}
    twice |= {item.item for item in items if len(item.ends) > 1}
    twice |= {item.item for item in items if len(set(item.token_indexes)) < len(item.token_indexes)}
    return len(twice)


def within_slo(item: ItemTimes, idle: IdleTimes, factor: float) -> bool:
    """Did a request end well within ``factor`` times what it takes on an idle node?"""
    if not item.is_done:
        return False
    if item.kind == "generate":
        gaps = item.gaps_s
        return (
            item.ttft_s is not None
            and item.ttft_s <= factor * idle.ttft_s
            and (not gaps or fmean(gaps) <= factor * idle.itl_s)
        )
    return item.response_s is not None and item.response_s <= factor * idle.slo_base_s


def summarize(
    items: Sequence[ItemTimes], idle: IdleTimes, *, nodes: int, blocked_s: Mapping[str, float]
) -> dict[str, object]:
    """Counts, rates, times and attainment of a run; the rest of the summary is added by who knows it."""
    requests = [item for item in items if item.kind != "train"]
    started = min((item.submitted for item in items if item.submitted is not None), default=0.0)
    ended = max((item.ended for item in items if item.ended is not None), default=started)
    duration_s = ended - started
    node_seconds = nodes * duration_s
    ends = Counter(item.ends[0] for item in items if item.ends)
    good = sum(item.kind == "train" and item.is_done for item in items)
    good += sum(within_slo(item, idle, GOODPUT_FACTOR) for item in requests)
    return {
        "submitted": len(items),
        **{end: ends[end] for end in sorted(END_EVENTS)},
        "refused": sum(item.was_refused and item.accepted is None for item in items),
        "duration_s": duration_s,
        "node_seconds": node_seconds,
        "items_per_second": _rate(ends["done"], duration_s),
        "items_per_node_second": _rate(ends["done"], node_seconds),
        "goodput_per_second": _rate(good, duration_s),
        "goodput_per_node_second": _rate(good, node_seconds),
        "response_s": percentiles(item.response_s for item in requests),
        "ttft_s": percentiles(item.ttft_s for item in requests),
        "itl_s": percentiles(gap for item in requests for gap in item.gaps_s),
        "slo_base_s": idle.slo_base_s,
        "slo_attainment": {
            str(factor): _rate(sum(within_slo(item, idle, factor) for item in requests), len(requests))
            for factor in SLO_FACTORS
        },
        "training_tax": training_tax(requests, blocked_s),
        "prediction_error": percentiles(map(prediction_error, requests)),
        "weights_versions": sorted(
            {i.weights_version for i in items if i.weights_version}, key=_version_order
        ),
    }


def training_tax(requests: Iterable[ItemTimes], blocked_s: Mapping[str, float]) -> float:
    """Σ time a ready step waited behind training ÷ Σ (response − that wait)."""
    answered = [
        (item.response_s, blocked_s.get(item.item, 0.0)) for item in requests if item.response_s is not None
    ]
    return _rate(
        sum(blocked for _, blocked in answered), sum(response - blocked for response, blocked in answered)
    )


def prediction_error(item: ItemTimes) -> float | None:
    """|predicted response − response| ÷ response of an item that is done and for which an end was predicted."""
    predicted_s, response_s = item.predicted_response_s, item.response_s
    return None if predicted_s is None or not response_s else abs(predicted_s - response_s) / response_s


def before_and_after(values: Sequence[float]) -> dict[str, float | None]:
    """Means of the first and the last fifth."""
    fifth = math.ceil(len(values) / 5)
    return {
        "before": fmean(values[:fifth]) if values else None,
        "after": fmean(values[-fifth:]) if values else None,
    }


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p95 and p99, by linear interpolation."""
    known = sorted(value for value in values if value is not None)
    return {f"p{percent}": percentile(known, percent) if known else None for percent in (50, 95, 99)}


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Between the two nearest of some ascending values."""
    place = (len(ascending) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])


def _rate(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
