"""In which order a stage does its pieces of a step: as the schedule says, and from step to step where steps overlap.

One piece of each stage at a time is with the compute loop. What it is follows from the schedule, not from what happens
to arrive first. Two things may pass a piece that can't run yet, since neither needs more memory nor changes a number:
gradients of weights, which nobody waits for, and a backward where the next forward is *held up*: it waits for weights
that only a commit makes, or for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class Course:
    """What one stage has still to do, in its order."""

    most_held: int
    """Microbatches between forward and last gradient, where steps overlap."""
    running: Piece | None = None
    """What the compute loop has."""
    _todo: list[Piece] = field(default_factory=list)
    _held: int = 0

    def add(self, pieces: Sequence[Piece]) -> None:
        """Another step's pieces, behind what is left."""
        self._todo = (
            follow(self._todo, pieces, held=self._held, most_held=self.most_held)
            if self._todo
            else list(pieces)
        )

    def take(self, can_run: Callable[[Piece], bool], is_held_up: Callable[[Piece], bool]) -> Piece | None:
        """The next piece, if one can run and none does; it is running until `end`."""
        if self.running is not None or not self._todo:
            return None
        piece = next(filter(can_run, self._candidates(is_held_up)), None)
        if piece is not None:
            self.running = piece
            self._todo.remove(piece)
            self._held += piece.work is Work.FORWARD
            self._held -= piece.work in {Work.BACKWARD, Work.WEIGHT_GRADIENT}
        return piece

    def end(self, piece: Piece) -> None:
        """It ran; nothing happens if it was forgotten meanwhile."""
        if self.running is piece:
            self.running = None

    def clear(self) -> None:
        """Forget everything."""
        self.running, self._todo, self._held = None, [], 0

    def _candidates(self, is_held_up: Callable[[Piece], bool]) -> list[Piece]:
        """The first piece, and the one that may pass it."""
        head = self._todo[0]
        may_pass = {Work.WEIGHT_GRADIENT} if not is_held_up(head) else set(Work) - {Work.FORWARD}
        return [head, *[piece for piece in self._todo[1:] if piece.work in may_pass][:1]]


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
