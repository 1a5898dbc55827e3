"""What a schedule makes workers keep: activations, from a microbatch's forward to its last gradient on that stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lemix_common.schedules.action import Action, Schedule, Work


def held_by_stage(schedule: Schedule) -> tuple[int, ...]:
    """The most microbatches whose activations each stage holds at a time."""
    most = Counter[int]()
    for order, stages in zip(schedule.orders, schedule.hosted(), strict=True):
        for stage in stages:
            most[stage] = _most_held(action for action in order if action.stage == stage)
    return tuple(most[stage] for stage in range(schedule.stages))


def held_by_worker(schedule: Schedule) -> tuple[int, ...]:
    """The same by worker, in microbatches of one stage; its stages needn't be at their most together."""
    return tuple(_most_held(order) for order in schedule.orders)


def _most_held(actions: Iterable[Action]) -> int:
    held = most = 0
    for action in actions:
        if action.work is Work.FORWARD:
            held += 1
            most = max(most, held)
        elif action.work is not Work.INPUT_GRADIENT:
            held -= 1
    return most
