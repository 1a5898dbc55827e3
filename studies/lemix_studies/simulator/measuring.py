"""The figures of an outcome, by the names and definitions of all reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lemix_studies.measures import GOODPUT_FACTOR, SLO_FACTORS, IdleTimes, percentiles
from lemix_studies.simulator.scenario import Outcome, Record


def measures(outcome: Outcome, slo_base_s: float | None = None) -> dict[str, object]:
    """Counts, rates, times and attainment of a simulation.

    ``slo_base_s`` replaces that of the outcome's own requests where several runs share one. Times to the first token
    and between tokens are judged by their own values on an idle node. ``paper_throughput`` is the paper's: items by the
    sum over nodes of first start to last end.
    """
    idle = outcome.idle if slo_base_s is None else replace(outcome.idle, slo_base_s=slo_base_s)
    requests = [record for record in outcome.records if record.kind != "train"]
    num_trained = len(outcome.records) - len(requests)
    within = {factor: _num_within(requests, idle, factor) for factor in (*SLO_FACTORS, GOODPUT_FACTOR)}
    good = num_trained + within[GOODPUT_FACTOR]
    submitted = len(outcome.records)
    return {
        "submitted": submitted,
        "done": submitted,
        **dict.fromkeys(
            ("failed", "cancelled", "refused", "lost", "duplicated", "dead_lettered", "capped"), 0
        ),
        "trained": num_trained,
        "duration_s": outcome.duration_s,
        "node_seconds": outcome.node_seconds,
        "paper_span_s": outcome.paper_span_s,
        "items_per_second": _rate(submitted, outcome.duration_s),
        "items_per_node_second": _rate(submitted, outcome.node_seconds),
        "goodput_per_second": _rate(good, outcome.duration_s),
        "goodput_per_node_second": _rate(good, outcome.node_seconds),
        "paper_throughput": _rate(submitted, outcome.paper_span_s),
        "response_s": percentiles(record.response_s for record in requests),
        "response_mean_s": fmean(record.response_s for record in requests) if requests else None,
        "ttft_s": percentiles(
            record.first_token_at - record.arrived_at
            for record in requests
            if record.first_token_at is not None
        ),
        "itl_s": percentiles(gap for record in requests for gap in record.gaps_s),
        "slo_base_s": idle.slo_base_s,
        "slo_attainment": {str(factor): _rate(within[factor], len(requests)) for factor in SLO_FACTORS},
    }


def is_within(record: Record, idle: IdleTimes, factor: float) -> bool:
    """Whether a request ended within ``factor`` times what it takes on an idle node."""
    if record.first_token_at is None:
        return record.response_s <= factor * idle.slo_base_s
    if record.first_token_at - record.arrived_at > factor * idle.ttft_s:
        return False
    return not record.gaps_s or fmean(record.gaps_s) <= factor * idle.itl_s


def _num_within(requests: Sequence[Record], idle: IdleTimes, factor: float) -> int:
    return sum(is_within(record, idle, factor) for record in requests)


def _rate(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0
