"""What the compute loop does next: always the most urgent step that can run, ties by arrival.

Training steps are cut: they yield at safepoints, where a serving step that has become ready runs first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum


class Urgency(IntEnum):
    """Lower runs first. Serving comes before training, and what finishes a step before what begins one."""

    DECODE = 0
    PREFILL = 1
    OPTIMIZER = 2
    BACKWARD = 3
    FORWARD = 4
    WEIGHT_GRADIENT = 5


CATEGORY = {
    Urgency.DECODE: "decode",
    Urgency.PREFILL: "prefill",
    Urgency.OPTIMIZER: "optimizer",
    Urgency.BACKWARD: "training_backward",
    Urgency.FORWARD: "training_forward",
    Urgency.WEIGHT_GRADIENT: "training_backward",
}
"""What a step is called in traces."""


@dataclass(eq=False)
class Batch:
    """What a serving step computes; told when it runs, if it is decided then."""

    items: list[tuple[str, float]] = field(default_factory=list)
    """With the time since when each could have been computed on."""
    version: str = ""
    num_tokens: int = 0
    contexts: int = 0
    """Σ(length · context) of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A piece of compute on one stage."""

    urgency: Urgency
    node: int
    stage: int
    item: str
    """The item, or for training RUN:STEP:MICROBATCH."""
    version: str
    ready_at: float
    """When it could have begun."""
    run: Callable[[], Iterator[None] | None]
    """Does it, or begins it and yields at safepoints."""
    failed: Callable[[Exception], None]
    batch: Batch | None = None
    """Of a serving step, all its items."""
    lengths: tuple[int, ...] = ()
    """Of a whole pass over a training microbatch, its examples' tokens."""
    rank: int = 0
    """Its place in the schedule, where that orders the passes of several stages of this worker: before urgency."""

    @property
    def is_training(self) -> bool:
        """Training work gives way to serving work."""
        return self.urgency >= Urgency.OPTIMIZER


@dataclass(eq=False)
class Step:
    """A task that waits for its turn, or for its next one."""

    task: Task
    place: tuple[int, ...]
    """What is lower runs first."""
    rest: Iterator[None] | None = None
    is_done: bool = False

    def __lt__(self, other: Step) -> bool:
        return self.place < other.place

    def advance(self) -> None:
        """Run to the next safepoint, or to the end."""
        if self.rest is None:
            self.rest = self.task.run()
        self.is_done = self.rest is None or _is_at_end(self.rest)


def _is_at_end(rest: Iterator[None]) -> bool:
    try:
        next(rest)
    except StopIteration:
        return True
    return False


@dataclass
class ReadyQueue:
    """Tasks in the order the loop takes them."""

    is_fifo: bool = False
    """By arrival alone, and without giving way: the paper's order."""
    _serving: list[Step] = field(default_factory=list)
    _training: list[Step] = field(default_factory=list)
    _arrivals: int = 0

    def __len__(self) -> int:
        return len(self._serving) + len(self._training)

    @property
    def has_serving(self) -> bool:
        """Not only training waits."""
        return bool(self._serving)

    def add(self, task: Task) -> None:
        """Let the task wait for its turn."""
        self._arrivals += 1
        kind = () if self.is_fifo else (min(task.urgency, Urgency.BACKWARD), task.rank, task.urgency)
        self.put_back(Step(task, (*kind, self._arrivals)))

    def take(self, *, is_training_due: bool = False) -> Step:
        """The most urgent task, the oldest of its kind; of training where that is due and there is some."""
        heads = [heap for heap in (self._serving, self._training) if heap]
        if self.is_fifo:
            heads.sort(key=lambda heap: heap[0].place)
        elif is_training_due:
            heads.reverse()
        return heapq.heappop(heads[0])

    def put_back(self, step: Step) -> None:
        """Let a step that was interrupted wait for its next turn, in its old place."""
        heapq.heappush(self._training if step.task.is_training else self._serving, step)

    def is_awaited(self, step: Step) -> bool:
        """Whether work of the other kind, serving or training, waits."""
        return bool(self._serving if step.task.is_training else self._training)

    def must_give_way(self, step: Step) -> bool:
        """At a safepoint of a training step: whether serving is ready."""
        return not self.is_fifo and step.task.is_training and bool(self._serving)
