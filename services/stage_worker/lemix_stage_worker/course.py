"""In which order a stage does its pieces of a step: as the schedule says, and from step to step where steps overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lemix_common.schedules import Work, schedule_named


@dataclass(frozen=True, slots=True)
class Piece:
    """One action of a stage, of one step."""

    step: int
    work: Work
    microbatch: int
    """Of the step."""
    rank: int = 0
    """Its place among those of all the worker's stages, where the schedule gives a worker several."""


def pieces_of(
    schedule: str, *, stage: int, stages: int, workers: int, step: int, microbatches: Sequence[int]
) -> list[Piece]:
    """A stage's pieces of the microbatches that one node computes of a step; ``workers`` are the node's."""
    if not microbatches:
        return []
    has_several = schedule == "interleaved"
    data = schedule_named(
        "1f1b" if schedule == "a-pp" else schedule,  # a-pp is 1f1b that goes on, see `follow`
        stages=stages,
        microbatches=len(microbatches),
        workers=workers if has_several else None,
    )
    order = next(order for order in data.orders if any(action.stage == stage for action in order))
    return [
        Piece(step, action.work, microbatches[action.microbatch], rank if has_several else 0)
        for rank, action in enumerate(order)
        if action.stage == stage
    ]


def follow(before: Sequence[Piece], after: Sequence[Piece], *, held: int, most_held: int) -> list[Piece]:
    """What is left of a step, and the next step behind it without a gap.

    Forwards go first until ``most_held`` microbatches are held (``held`` are already), then one of each by turns. So
    the two together are what one longer step would be.
    """
    forwards = [piece for piece in (*before, *after) if piece.work is Work.FORWARD]
    backwards = [piece for piece in (*before, *after) if piece.work is not Work.FORWARD]
    merged: list[Piece] = []
    while forwards or backwards:
        goes_forward = bool(forwards) and (held < most_held or not backwards)
        merged.append(forwards.pop(0) if goes_forward else backwards.pop(0))
        held += 1 if goes_forward else -1
    return merged
