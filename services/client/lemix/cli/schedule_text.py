"""`lemix train --explain`: schedules drawn, with what they cost. It needs no cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from lemix_common.errors import BadInput
from lemix_common.schedules import (
    SCHEDULES,
    Schedule,
    Timing,
    Work,
    grid,
    held_by_stage,
    held_by_worker,
    schedule_named,
    simulate,
)

MOST_MICROBATCHES = 4_096
"""Times stages; beyond this a picture helps nobody."""
STEPS = {"a-pp": 3}
"""Drawn if not said otherwise: its third step is the first whose weights show the delay."""

_MEANINGS = {
    Work.FORWARD: "F forward",
    Work.BACKWARD: "B backward",
    Work.INPUT_GRADIENT: "I gradient of the input",
    Work.WEIGHT_GRADIENT: "W gradient of the weights",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be explained; without a name, every schedule."""

    name: str | None = None
    stages: int = 4
    microbatches: int = 8
    workers: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """A schedule in time."""

    schedule: Schedule
    timing: Timing
    bubble_share_of_next: float
    """The share of one more step after it."""


def as_text(subject: Subject, *, width: int) -> str:
    """A picture of each schedule and its figures."""
    return "\n\n\n".join(
        _text(found, width) if isinstance(found, Explained) else f"{name}: {found}"
        for name, found in _explained(subject).items()
    )


def as_json(subject: Subject) -> str:
    """The same as one JSON object, with the orders."""
    return json.dumps(
        {
            "schedules": [
                _fields(found) if isinstance(found, Explained) else {"schedule": name, "refused": found}
                for name, found in _explained(subject).items()
            ]
        }
    )


def _explained(subject: Subject) -> dict[str, Explained | str]:
    """The named schedule, or all; one of all that can't be is there as the reason."""
    if subject.name is not None:
        return {subject.name: _explain(subject, subject.name)}
    found: dict[str, Explained | str] = {}
    for name in SCHEDULES:
        try:
            found[name] = _explain(subject, name)
        except BadInput as error:
            found[name] = str(error)
    if not any(isinstance(each, Explained) for each in found.values()):
        raise BadInput(str(found[SCHEDULES[0]]))
    return found


def _explain(subject: Subject, name: str) -> Explained:
    steps = STEPS.get(name, 1) if subject.steps is None else subject.steps
    if subject.stages * subject.microbatches * steps > MOST_MICROBATCHES:
        raise BadInput("too much for a picture: give fewer stages, microbatches or steps")
    schedule, longer = (
        schedule_named(
            name,
            stages=subject.stages,
            microbatches=subject.microbatches,
            workers=subject.workers,
            steps=number,
        )
        for number in (steps, steps + 1)
    )
    timing = simulate(schedule)
    return Explained(schedule, timing, _bubble_share_between(timing, simulate(longer)))


def _bubble_share_between(shorter: Timing, longer: Timing) -> float:
    time = (longer.makespan - shorter.makespan) * len(shorter.spans)
    return 1 - (sum(longer.busy) - sum(shorter.busy)) / time


def _text(explained: Explained, width: int) -> str:
    schedule = explained.schedule
    workers = len(schedule.orders)
    kinds = [kind for kind in Work if any(action.work is kind for action in schedule.actions())]
    bubble = f"{explained.timing.bubble_share:.1%} of the workers' time"
    if schedule.delay:
        bubble += f", {explained.bubble_share_of_next:.1%} of each further step's"
    held = f"{_listed(held_by_stage(schedule))} by stage"
    if workers < schedule.stages:
        held += f"; {_listed(held_by_worker(schedule))} by worker"
    title = (
        f"{schedule.name}: {_many(schedule.stages, 'stage')} on {_many(workers, 'worker')}, "
        f"{_many(schedule.microbatches, 'microbatch', 'microbatches')} a step, {_many(schedule.steps, 'step')}"
    )
    return "\n".join(
        [
            title,
            "",
            grid(schedule, width=width),
            "",
            f"{', '.join(_MEANINGS[kind] for kind in kinds)}, . idle",
            f"bubble: {bubble}",
            f"activations held at most: {held}",
            f"weights: {_weights(schedule)}",
        ]
    )


def _weights(schedule: Schedule) -> str:
    if not schedule.delay:
        return "a step begins when the one before is committed, on what that made"
    versions = ", ".join(
        f"{_forwards(schedule, step)} on version {schedule.version_of(step)}"
        for step in range(schedule.steps)
    )
    return f"one version old after the first step: {versions}"


def _forwards(schedule: Schedule, step: int) -> str:
    first = step * schedule.microbatches
    last = first + schedule.microbatches - 1
    return f"F{first} to F{last}" if last > first else f"F{first}"


def _fields(explained: Explained) -> dict[str, object]:
    schedule = explained.schedule
    return {
        "schedule": schedule.name,
        "stages": schedule.stages,
        "workers": len(schedule.orders),
        "microbatches": schedule.microbatches,
        "steps": schedule.steps,
        "delay": schedule.delay,
        "bubble_share": explained.timing.bubble_share,
        "bubble_share_of_a_further_step": explained.bubble_share_of_next,
        "activations_held_by_stage": held_by_stage(schedule),
        "activations_held_by_worker": held_by_worker(schedule),
        "orders": [[str(action) for action in order] for order in schedule.orders],
        "grid": grid(schedule),
    }


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _many(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"
