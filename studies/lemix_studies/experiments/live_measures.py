"""What is measured in a cluster that ran a point: beside a replay's measures, the paper's; pure functions of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, Final

from lemix import Score
from lemix_studies.replay import Outcome
from lemix_studies.spans import Span

_TIMES: Final = ("duration_s", "node_seconds", "slo_base_s", "max_lateness_s", "paper_span_s")
_DISTRIBUTIONS: Final = ("response_s", "ttft_s", "itl_s")
_RATES: Final = (
    "items_per_second",
    "items_per_node_second",
    "goodput_per_second",
    "goodput_per_node_second",
    "paper_throughput",
)


def trained_when_committed(outcome: Outcome) -> Outcome:
    """Examples that ended with their step's optimizers, not with the publication of its version."""
    stepped: dict[str, float] = {}
    for span in of_work(outcome.spans):
        if span["cat"] == "optimizer":
            stepped[span["item"]] = max(span["end"], stepped.get(span["item"], 0.0))
    ends = {
        item: stepped[name]
        for step in outcome.steps
        if (name := f"{step.run_id}:{step.step}") in stepped
        for item in step.items
    }
    items = [replace(item, ended=ends.get(item.item, item.ended)) for item in outcome.items]
    return replace(outcome, items=items)


def of_work(spans: Iterable[Span]) -> list[Span]:
    """Without the optimizers of nodes that computed nothing of their step, which come to their turn all the same."""
    known = list(spans)
    learned = {
        (span["node"], span["item"].rpartition(":")[0])
        for span in known
        if span["cat"].startswith("training")
    }
    return [span for span in known if span["cat"] != "optimizer" or (span["node"], span["item"]) in learned]


def in_its_time(summary: Mapping[str, object], slowdown: float) -> dict[str, object]:
    """A slowed run's measures as those of the accelerator that was meant."""
    measures = dict(summary)
    for name in _TIMES:
        measures[name] = _scaled(measures.get(name), 1 / slowdown)
    for name in _RATES:
        measures[name] = _scaled(measures.get(name), slowdown)
    for name in _DISTRIBUTIONS:
        of_name = measures[name]
        assert isinstance(of_name, dict)
        measures[name] = {part: _scaled(value, 1 / slowdown) for part, value in of_name.items()}
    return measures


def _scaled(value: object, factor: float) -> float | None:
    return value * factor if isinstance(value, (int, float)) else None


def measures_of_spans(outcome: Outcome) -> dict[str, object]:
    """What the paper measures: items by the sum over nodes of first start to last end; nodes that got work."""
    items = {item.item for item in outcome.items}
    spans = [span for span in of_work(outcome.spans) if span["item"] in items or ":" in span["item"]]
    by_node: dict[int, list[Mapping[str, Any]]] = {}
    for span in spans:
        by_node.setdefault(span["node"], []).append(span)
    span_s = sum(
        max(span["end"] for span in of_node) - min(span["start"] for span in of_node)
        for of_node in by_node.values()
    )
    done = sum(item.is_done for item in outcome.items)
    return {
        "paper_span_s": span_s,
        "paper_throughput": done / span_s if span_s else 0.0,
        "active_nodes": len(by_node),
        "trained": sum(item.is_done for item in outcome.items if item.kind == "train"),
    }


def inference_loss(outcome: Outcome) -> float | None:
    """Of all that was scored, whichever version answered: the mean over requests, as the paper's."""
    losses = [answer.loss for answer in outcome.answers.values() if isinstance(answer, Score)]
    return fmean(losses) if losses else None
