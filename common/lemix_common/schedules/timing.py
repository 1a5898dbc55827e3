"""When each action of a schedule runs, given what it costs: all that follows from the orders and what actions need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lemix_common.errors import BadInput
from lemix_common.schedules.action import Action, Schedule, Work

Cost = Callable[[Action], float]


def unit_cost(action: Action) -> float:
    """One a forward and one each half of a backward."""
    return float(len(action.parts()))


@dataclass(frozen=True, slots=True)
class Span:
    """When an action runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timing:
    """A schedule in time."""

    spans: tuple[tuple[Span, ...], ...]
    """Each worker's, in its order."""
    versions: tuple[float, ...]
    """When each version of the weights is there; version 0 is at the start."""

    @property
    def makespan(self) -> float:
        """From the start to the end of the last action."""
        return max((span.end for spans in self.spans for span in spans), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """How long each worker works."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """Each worker's idle share of the makespan."""
        makespan = self.makespan
        return tuple(1 - busy / makespan if makespan else 0.0 for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """All workers' idle share of their time."""
        return sum(self.bubble_shares) / len(self.spans)


def simulate(schedule: Schedule, cost: Cost = unit_cost, *, send: float = 0.0, commit: float = 0.0) -> Timing:
    """Let every worker do its order, each action as soon as the worker is free and what it needs is there.

    ``cost`` is what an action takes, ``send`` what a tensor takes to another worker, ``commit`` what lies between a
    step's last gradient and its weights. Orders that wait for each other for ever are a `BadInput`.
    """
    course = _Course(schedule, cost, send, commit, spans=[[] for _ in schedule.orders])
    while any(course.advance(worker) for worker in range(len(schedule.orders))):
        pass  # until no worker can do anything more
    stuck = [course.next_of(worker) for worker in range(len(schedule.orders))]
    if any(stuck):
        waits = "; ".join(f"{action} for {course.missing(action)}" for action in stuck if action)
        raise BadInput(f"{schedule.name} can't go on: {waits}")
    return Timing(
        spans=tuple(tuple(spans) for spans in course.spans),
        versions=tuple(at for _, at in sorted(course.versions.items())),
    )


@dataclass(slots=True)
class _Course:
    """How far a simulation has come."""

    schedule: Schedule
    cost: Cost
    send: float
    commit: float
    spans: list[list[Span]]
    done: dict[Action, tuple[int, float]] = field(default_factory=dict)
    """The worker and the end of each part of what was done."""
    gradients: dict[int, list[float]] = field(default_factory=dict)
    """A step's, as their ends."""
    versions: dict[int, float] = field(default_factory=lambda: {0: 0.0})

    def next_of(self, worker: int) -> Action | None:
        """What a worker does next, None at its order's end."""
        order, position = self.schedule.orders[worker], len(self.spans[worker])
        return order[position] if position < len(order) else None

    def advance(self, worker: int) -> bool:
        """Do all that a worker can do now; False if that is nothing."""
        before = len(self.spans[worker])
        while (action := self.next_of(worker)) and not self.missing(action):
            spans = self.spans[worker]
            start = max([spans[-1].end if spans else 0.0, *self._arrivals(action, worker)])
            span = Span(action, start, start + self.cost(action))
            spans.append(span)
            self._note(span, worker)
        return len(self.spans[worker]) > before

    def missing(self, action: Action) -> str:
        """The first thing that an action still waits for, empty if it can run."""
        version = self.schedule.version_of(self.schedule.step_of(action))
        if action.work is Work.FORWARD and version not in self.versions:
            return f"version {version}"
        return next((str(need) for need in action.needs(self.schedule.stages) if need not in self.done), "")

    def _arrivals(self, action: Action, worker: int) -> list[float]:
        arrivals = [
            end + self.send * (origin != worker)
            for origin, end in (self.done[need] for need in action.needs(self.schedule.stages))
        ]
        if action.work is Work.FORWARD:
            arrivals.append(self.versions[self.schedule.version_of(self.schedule.step_of(action))])
        return arrivals

    def _note(self, span: Span, worker: int) -> None:
        """What this action finishes; a step's last gradient makes the next version."""
        step = self.schedule.step_of(span.action)
        for part in span.action.parts():
            self.done[part] = worker, span.end
            if part.work is Work.WEIGHT_GRADIENT:
                ends = self.gradients.setdefault(step, [])
                ends.append(span.end)
                if len(ends) == self.schedule.stages * self.schedule.microbatches:
                    self.versions[step + 1] = max(*ends, self.versions.get(step, 0.0)) + self.commit
