"""What the compute loop does next: always the most urgent step that can run, ties by arrival."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum


class Urgency(IntEnum):
    """Lower runs first. Serving comes before training, and what finishes a step before what begins one."""

    DECODE = 0
    PREFILL = 1
    OPTIMIZER = 2
    BACKWARD = 3
    FORWARD = 4


CATEGORY = {
    Urgency.DECODE: "decode",
    Urgency.PREFILL: "prefill",
    Urgency.OPTIMIZER: "optimizer",
    Urgency.BACKWARD: "training_backward",
    Urgency.FORWARD: "training_forward",
}
"""What a step is called in traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One uninterruptible piece of compute on one stage."""

    urgency: Urgency
    node: int
    stage: int
    item: str
    """The item, or for training RUN:STEP:MICROBATCH."""
    version: str
    ready_at: float
    """When it could have begun."""
    run: Callable[[], None]
    failed: Callable[[Exception], None]

    @property
    def is_training(self) -> bool:
        """Training work gives way to serving work."""
        return self.urgency >= Urgency.OPTIMIZER


@dataclass
class ReadyQueue:
    """Tasks in the order the loop takes them."""

    _heap: list[tuple[Urgency, int, Task]] = field(default_factory=list)
    _arrivals: int = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, task: Task) -> None:
        """Let the task wait for its turn."""
        self._arrivals += 1
        heapq.heappush(self._heap, (task.urgency, self._arrivals, task))

    def take(self) -> Task:
        """The most urgent task, the oldest of its kind."""
        return heapq.heappop(self._heap)[2]
