"""Pieces of the stages' time: what each stage did when, on a clock that begins with what is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Position = tuple[int, int]
"""(node, stage)."""

INFERENCE = ("prefill", "decode")
TRAINING = ("training_forward", "training_backward", "optimizer")
IDLE_SERVING = "idle_serving"
IDLE_PIPELINE = "idle_pipeline"
IDLENESS = (IDLE_SERVING, IDLE_PIPELINE)
CATEGORIES = (*INFERENCE, *TRAINING, *IDLENESS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One category of work, or of idleness, on one stage; times in seconds."""

    node: int
    stage: int
    category: str
    start: float
    end: float
    worker: str = ""
    item: str = ""
    """The request or example; of an optimizer step, and of an example whose name isn't known, RUN:STEP[:MICROBATCH]."""
    unit: str = ""
    """What must be through before the node has nothing of it left: the request, or the training step (RUN:STEP)."""
    version: str = ""
    others: tuple[str, ...] = ()
    """Further requests of an iteration, as far as they are named."""
    more: int = 0
    """How many it was done for beyond these."""

    @property
    def units(self) -> tuple[str, ...]:
        """What waits for it, as far as it is named: of an iteration all its requests."""
        return self.unit, *self.others

    @property
    def position(self) -> Position:
        return self.node, self.stage

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def is_idle(self) -> bool:
        return self.category in IDLENESS


def pieces_of(
    spans: Iterable[Mapping[str, Any]],
    *,
    zero: float | None = None,
    steps: Mapping[str, Sequence[str]] | None = None,
) -> list[Piece]:
    """The pieces of some spans of the events stream, in order of their start.

    ``zero`` is the moment from which time counts (by default the first span's start); what began earlier is left out.
    ``steps`` names the examples of a step (RUN:STEP), a microbatch each.
    """
    known = sorted(spans, key=lambda span: float(span["start"]))
    if zero is None:
        zero = float(known[0]["start"]) if known else 0.0
    return [_piece(span, zero, steps or {}) for span in known if float(span["start"]) >= zero]


def _piece(span: Mapping[str, Any], zero: float, steps: Mapping[str, Sequence[str]]) -> Piece:
    item = unit = str(span.get("item") or "")
    if span["cat"] in TRAINING:
        unit, microbatch = _step_and_microbatch(item)
        examples = steps.get(unit, ())
        if microbatch is not None and microbatch < len(examples):
            item = examples[microbatch]
    return Piece(
        node=int(span["node"]),
        stage=int(span["stage"]),
        category=str(span["cat"]),
        start=round(float(span["start"]) - zero, 6),
        end=round(float(span["end"]) - zero, 6),
        worker=str(span.get("worker") or ""),
        item=item,
        unit=unit,
        version=str(span.get("version") or ""),
        others=tuple(map(str, span.get("others", ()))),
        more=int(span.get("more", 0)),
    )


def _step_and_microbatch(item: str) -> tuple[str, int | None]:
    """Of RUN:STEP:MICROBATCH, or of an optimizer's RUN:STEP."""
    run, _, rest = item.partition(":")
    step, _, microbatch = rest.partition(":")
    return f"{run}:{step}", int(microbatch) if microbatch.isdigit() else None
