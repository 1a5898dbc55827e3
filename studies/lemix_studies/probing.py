"""What requests take on an idle cluster: a few like the workload's own, one at a time, before it begins.

They are as long, but begin with other tokens: else caches would know a part of them, or then of the workload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from lemix import Client
from lemix_common.clock import wait_until
from lemix_common.errors import WaitTimeout
from lemix_studies.history import History
from lemix_studies.measures import IdleTimes, items_of
from lemix_studies.spans import SpanTail, stage_seconds
from lemix_studies.workload import PlannedArrival

NUM_PROBES = 8
_SPANS_TIMEOUT_S = 3.0


def probe_idle_times(
    client: Client, arrivals: Sequence[PlannedArrival], history: History, tail: SpanTail, *, prefix: str
) -> IdleTimes:
    """Mean stage seconds, first-token times and gaps of evenly chosen requests; the first one only warms up."""
    requests = [arrival for arrival in arrivals if arrival.kind != "train"]
    if not requests:
        return IdleTimes(slo_base_s=0.0, ttft_s=0.0, itl_s=0.0)
    chosen = [requests[0], *(requests[i * len(requests) // NUM_PROBES] for i in range(NUM_PROBES))]
    for number, arrival in enumerate(chosen):
        turned = _turned(arrival.prompt, number + 1)
        item = replace(arrival, line=number, prompt=turned).item(prefix)
        history.kinds[str(item.item_id)] = arrival.kind
        history.record("submitted", str(item.item_id))
        client.submit(item).result()
    measured = [item for item in items_of(history.events).values() if not item.item.endswith("-000000")]
    responses = [item.response_s for item in measured if item.response_s is not None]
    return IdleTimes(
        slo_base_s=_mean(_stage_times(tail, [item.item for item in measured]) or responses),
        ttft_s=_mean(item.ttft_s for item in measured if item.ttft_s is not None),
        itl_s=_mean(gap for item in measured for gap in item.gaps_s),
    )


def _stage_times(tail: SpanTail, items: Sequence[str]) -> list[float]:
    """The sum of each item's stage times; none if the stages don't report them."""

    def known() -> dict[str, float]:
        seconds = stage_seconds(list(tail.spans))
        return {item: seconds[item] for item in items if item in seconds}

    try:
        wait_until(lambda: len(known()) == len(items), what="the stages report", timeout_s=_SPANS_TIMEOUT_S)
    except WaitTimeout:
        return []
    return list(known().values())


def _turned(prompt: tuple[int, ...], by: int) -> tuple[int, ...]:
    at = by % len(prompt) if prompt else 0
    return prompt[at:] + prompt[:at]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return fmean(known) if known else 0.0
