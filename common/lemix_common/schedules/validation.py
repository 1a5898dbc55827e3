"""Whether a schedule, wherever it comes from, computes what it should and comes to an end."""

from __future__ import annotations

from collections import Counter
from itertools import product

from lemix_common.errors import BadInput
from lemix_common.schedules.action import Action, Schedule, Work
from lemix_common.schedules.timing import simulate


def validate(schedule: Schedule) -> None:
    """Refuse a schedule with a `BadInput` that says what is wrong, or return.

    Each stage is on one worker; each microbatch has one forward and one backward (or both its halves) on each stage;
    and no order makes workers wait for each other, or for weights of a step that can't end before, for ever.
    """
    times = Counter(part for action in schedule.actions() for part in action.parts())
    wanted = {
        Action(stage, work, microbatch)
        for microbatch, stage, work in product(
            range(schedule.steps * schedule.microbatches),
            range(schedule.stages),
            (Work.FORWARD, Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT),
        )
    }
    faults = [
        *(f"{action} is missing" for action in _sorted(wanted - set(times))),
        *(f"{action} is not of this schedule" for action in _sorted(set(times) - wanted)),
        *(
            f"{action} is done {times[action]} times"
            for action in _sorted({action for action in wanted if times[action] > 1})
        ),
        *(
            f"stage {stage} is on {workers} workers"
            for stage, workers in Counter(stage for stages in schedule.hosted() for stage in stages).items()
            if workers > 1
        ),
    ]
    if faults:
        raise BadInput(f"{schedule.name} can't be used: {faults[0]}{_more(len(faults) - 1)}")
    simulate(schedule)


def _sorted(actions: set[Action]) -> list[Action]:
    return sorted(actions, key=lambda action: (action.microbatch, action.stage, action.work))


def _more(number: int) -> str:
    return f" (and {number} more)" if number else ""
