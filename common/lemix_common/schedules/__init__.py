"""Pipeline schedules as data: which worker does what in which order, checked, timed and drawn without running it.

A microbatch goes forward through the stages and its gradient comes back. Each worker has an order, a list of
actions such as ``2F0``: stage 2, forward, microbatch 0. A worker does its actions strictly in that order, each as soon
as what it needs is there, so an order alone fixes all times, given what every action costs.

All schedules here are one idea with different numbers: a worker runs a *lead* of forwards ahead, then alternates
one forward and one backward, then ends with the backwards that are left. `orders` has them, `validate` checks any,
`simulate` times any, `held_by_stage` says what memory it takes, `grid` draws it.

A stage's gradients come in the order of microbatches under every schedule, so all of those that compute on the same
weights add up the same numbers in the same order.
"""

from lemix_common.schedules.action import Action, Schedule, Work
from lemix_common.schedules.memory import held_by_stage, held_by_worker
from lemix_common.schedules.orders import (
    SCHEDULES,
    a_pp,
    gpipe,
    interleaved,
    one_forward_one_backward,
    s_pp,
    schedule_named,
    zero_bubble,
)
from lemix_common.schedules.picture import grid
from lemix_common.schedules.timing import Cost, Span, Timing, simulate, unit_cost
from lemix_common.schedules.validation import validate

__all__ = [
    "SCHEDULES",
    "Action",
    "Cost",
    "Schedule",
    "Span",
    "Timing",
    "Work",
    "a_pp",
    "gpipe",
    "grid",
    "held_by_stage",
    "held_by_worker",
    "interleaved",
    "one_forward_one_backward",
    "s_pp",
    "schedule_named",
    "simulate",
    "unit_cost",
    "validate",
    "zero_bubble",
]
