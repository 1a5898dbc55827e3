"""What a schedule is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Work(StrEnum):
    """What is done with a microbatch on a stage, by the letters of ``torch.distributed.pipelining``."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both gradients at once: of the stage's input and of its weights."""
    INPUT_GRADIENT = "I"
    """The half of a backward that the stage before waits for."""
    WEIGHT_GRADIENT = "W"
    """The other half, which only the step's end waits for."""


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one stage; printed ``2F0``."""

    stage: int
    work: Work
    microbatch: int
    """Counted on from step to step: the second of two steps of four microbatches has 4 to 7."""

    def __str__(self) -> str:
        return f"{self.stage}{self.work}{self.microbatch}"

    def parts(self) -> tuple[Action, ...]:
        """What is done when this is: a whole backward is its two halves."""
        if self.work is not Work.BACKWARD:
            return (self,)
        return self._as(Work.INPUT_GRADIENT), self._as(Work.WEIGHT_GRADIENT)

    def needs(self, stages: int) -> tuple[Action, ...]:
        """What must be done before, on this stage and its neighbours."""
        match self.work:
            case Work.FORWARD:
                return (Action(self.stage - 1, self.work, self.microbatch),) if self.stage else ()
            case Work.BACKWARD | Work.INPUT_GRADIENT:
                forward = self._as(Work.FORWARD)
                if self.stage == stages - 1:
                    return (forward,)
                return forward, Action(self.stage + 1, Work.INPUT_GRADIENT, self.microbatch)
            case Work.WEIGHT_GRADIENT:
                return (self._as(Work.INPUT_GRADIENT),)

    def _as(self, work: Work) -> Action:
        return Action(self.stage, work, self.microbatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What each worker of one pipeline does, in order, in a number of optimizer steps."""

    name: str
    stages: int
    microbatches: int
    """Of one step."""
    steps: int = 1
    delay: int = 0
    """How many versions the weights that a step computes on are older than those it changes; 0: synchronous."""
    orders: tuple[tuple[Action, ...], ...]
    """Each worker's actions."""

    def actions(self) -> Iterable[Action]:
        """All actions, worker by worker."""
        return (action for order in self.orders for action in order)

    def step_of(self, action: Action) -> int:
        """The optimizer step that an action is for, from 0."""
        return action.microbatch // self.microbatches

    def version_of(self, step: int) -> int:
        """The weights that a step's forwards and backwards take: version n is what the first n steps made.

        The first step has nothing older than version 0, so with a delay the second one takes version 0 too.
        """
        return max(0, step - self.delay)

    def hosted(self) -> tuple[tuple[int, ...], ...]:
        """Each worker's stages."""
        return tuple(tuple(sorted({action.stage for action in order})) for order in self.orders)
