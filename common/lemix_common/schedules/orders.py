"""The schedules a user can choose from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Final

from lemix_common.errors import BadInput
from lemix_common.schedules.action import Action, Schedule, Work

Order = tuple[Action, ...]
ONE_STAGE_A_WORKER: Final = ("s-pp", "gpipe", "1f1b", "zero-bubble", "a-pp")
SCHEDULES: Final = ("s-pp", "gpipe", "1f1b", "interleaved", "zero-bubble", "a-pp")


def schedule_named(
    name: str, *, stages: int, microbatches: int, steps: int = 1, workers: int | None = None
) -> Schedule:
    """The schedule of a name in `SCHEDULES`; without ``workers`` there is one a stage, for interleaved one for two."""
    if name == "interleaved":
        if workers is None and stages % 2:
            raise BadInput(
                f"interleaved has two stages on each worker if not told otherwise: {stages} can't be, "
                "say how many workers"
            )
        return interleaved(
            stages, microbatches, workers=stages // 2 if workers is None else workers, steps=steps
        )
    if name not in ONE_STAGE_A_WORKER:
        raise BadInput(f"there is no schedule {name!r}: use {', '.join(SCHEDULES)}")
    if workers not in {None, stages}:
        raise BadInput(
            f"{name} has one stage on each worker: {stages} stages take {stages} workers, not {workers}"
        )
    make = {
        "s-pp": s_pp,
        "gpipe": gpipe,
        "1f1b": one_forward_one_backward,
        "zero-bubble": zero_bubble,
        "a-pp": a_pp,
    }[name]
    return make(stages, microbatches, steps=steps)


def s_pp(stages: int, microbatches: int, *, steps: int = 1) -> Schedule:
    """One microbatch at a time: the next is released when the last one's backward has ended (LeMix's S-PP)."""
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps)
    orders = [
        _lead_then_alternate(
            _all(stage, Work.FORWARD, microbatches), _all(stage, Work.BACKWARD, microbatches), lead=0
        )
        for stage in range(stages)
    ]
    return _synchronous("s-pp", orders, stages, microbatches, steps)


def gpipe(stages: int, microbatches: int, *, steps: int = 1) -> Schedule:
    """All forwards, then all backwards."""
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps)
    orders = [
        _lead_then_alternate(
            _all(stage, Work.FORWARD, microbatches),
            _all(stage, Work.BACKWARD, microbatches),
            lead=microbatches,
        )
        for stage in range(stages)
    ]
    return _synchronous("gpipe", orders, stages, microbatches, steps)


def one_forward_one_backward(stages: int, microbatches: int, *, steps: int = 1) -> Schedule:
    """Each stage is ahead by as many forwards as stages follow it, so that it holds few activations."""
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps)
    orders = [_one_forward_one_backward(stage, stages, microbatches) for stage in range(stages)]
    return _synchronous("1f1b", orders, stages, microbatches, steps)


def interleaved(stages: int, microbatches: int, *, workers: int, steps: int = 1) -> Schedule:
    """1F1B with several stages on each worker: stage s on worker s mod ``workers``.

    Microbatches go in rounds of about as many as there are workers: a round passes a worker's first stage, then its
    second, and so on. Rounds differ by one microbatch at most, larger ones first.
    """
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps, workers=workers)
    if stages % workers or stages == workers:
        raise BadInput(
            f"interleaved puts two or more stages on each worker, the same number on all: "
            f"{stages} stages on {workers} worker{'s' * (workers > 1)} can't be"
        )
    rounds = _rounds(microbatches, workers)
    orders = []
    for worker in range(workers):
        hosted = range(worker, stages, workers)
        lead = (len(hosted) - 1) * len(rounds[0]) + 2 * (workers - 1 - worker)
        forwards = [Action(stage, Work.FORWARD, m) for part in rounds for stage in hosted for m in part]
        backwards = [
            Action(stage, Work.BACKWARD, m) for part in rounds for stage in reversed(hosted) for m in part
        ]
        orders.append(_lead_then_alternate(forwards, backwards, lead=lead))
    return _synchronous("interleaved", orders, stages, microbatches, steps)


def zero_bubble(stages: int, microbatches: int, *, steps: int = 1) -> Schedule:
    """1F1B whose backwards are cut in two: a stage hands on its input's gradient before it turns to its weights'.

    Stage s is behind by s weight gradients, which fill the time when nothing comes back any more. With what these
    keep, every stage holds as many activations as the first one does under 1F1B (ZB-H1 of the zero-bubble paper).
    """
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps)
    orders = [_zero_bubble(stage, stages, microbatches) for stage in range(stages)]
    return _synchronous("zero-bubble", orders, stages, microbatches, steps)


def a_pp(stages: int, microbatches: int, *, steps: int = 1) -> Schedule:
    """Asynchronous: 1F1B that goes on from step to step, on weights that are exactly one version old.

    While a step's gradients make version n + 1, the next step already computes on version n, forward and backward; the
    one after that needs version n + 1. With as many microbatches as stages, a forward and a backward lie between the
    step's last gradient and that, time to commit it; with fewer there is none, so that is refused.
    """
    _require_at_least_one(stages=stages, microbatches=microbatches, steps=steps)
    if microbatches < stages:
        raise BadInput(
            f"a-pp needs as many microbatches a step as stages, or it would wait for its weights: "
            f"{microbatches} on {stages} stages can't be"
        )
    return Schedule(
        name="a-pp",
        stages=stages,
        microbatches=microbatches,
        steps=steps,
        delay=1,
        orders=tuple(
            _one_forward_one_backward(stage, stages, steps * microbatches) for stage in range(stages)
        ),
    )


# ---- parts
def _lead_then_alternate(forwards: Sequence[Action], backwards: Sequence[Action], *, lead: int) -> Order:
    lead = min(lead, len(forwards))
    steady = chain.from_iterable(zip(forwards[lead:], backwards, strict=False))
    return (*forwards[:lead], *steady, *backwards[len(forwards) - lead :])


def _one_forward_one_backward(
    stage: int, stages: int, microbatches: int, *, backward: Work = Work.BACKWARD
) -> Order:
    return _lead_then_alternate(
        _all(stage, Work.FORWARD, microbatches), _all(stage, backward, microbatches), lead=stages - 1 - stage
    )


def _zero_bubble(stage: int, stages: int, microbatches: int) -> Order:
    order: list[Action] = []
    for action in _one_forward_one_backward(stage, stages, microbatches, backward=Work.INPUT_GRADIENT):
        order.append(action)
        if action.work is Work.INPUT_GRADIENT and action.microbatch >= stage:
            order.append(Action(stage, Work.WEIGHT_GRADIENT, action.microbatch - stage))
    behind = min(stage, microbatches)
    return (*order, *_all(stage, Work.WEIGHT_GRADIENT, microbatches)[microbatches - behind :])


def _all(stage: int, work: Work, microbatches: int) -> list[Action]:
    return [Action(stage, work, microbatch) for microbatch in range(microbatches)]


def _rounds(microbatches: int, workers: int) -> list[range]:
    number = max(1, microbatches // workers)
    each, more = divmod(microbatches, number)
    borders = [index * each + min(index, more) for index in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


def _synchronous(name: str, orders: Iterable[Order], stages: int, microbatches: int, steps: int) -> Schedule:
    """One step's orders, again for each step."""
    return Schedule(
        name=name,
        stages=stages,
        microbatches=microbatches,
        steps=steps,
        orders=tuple(
            tuple(
                replace(action, microbatch=action.microbatch + step * microbatches)
                for step in range(steps)
                for action in order
            )
            for order in orders
        ),
    )


def _require_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise BadInput(f"{number} {name}: there must be at least 1")
