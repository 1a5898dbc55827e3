"""A schedule that would compute the wrong thing, or never end, is refused before it runs."""

from __future__ import annotations

import pytest

from lemix_common.errors import BadInput
from lemix_common.schedules import Action, Schedule, Work, simulate, validate


def read(*orders: str, microbatches: int = 2, **numbers: int) -> Schedule:
    """A schedule of two stages from text: a worker a line."""
    return Schedule(
        name="drawn",
        stages=2,
        microbatches=microbatches,
        orders=tuple(
            tuple(Action(int(text[0]), Work(text[1]), int(text[2:])) for text in order.split())
            for order in orders
        ),
        **numbers,
    )


def test_any_order_that_computes_all_is_valid() -> None:
    """Whole and split backwards may be mixed, and microbatches come back in any order."""
    validate(read("0F0 0F1 0B1 0I0 0W0", "1F0 1F1 1I1 1B0 1W1"))
    validate(read("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"))


@pytest.mark.parametrize(
    ("orders", "reason"),
    [
        (["0F0 0F1 0B0 0B1", "1F0 1B0 1F1"], r"1I1 is missing \(and 1 more\)"),
        (["0F0 0F1 0B0 0I1", "1F0 1B0 1F1 1B1"], "0W1 is missing"),
        (["0F0 0F1 0B0 0B1 0W1", "1F0 1B0 1F1 1B1"], "0W1 is done 2 times"),
        (["0F0 0F1 0B0 0B1 0F2", "1F0 1B0 1F1 1B1"], "0F2 is not of this schedule"),
        (["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1", "2F0"], "2F0 is not of this schedule"),
        (["0F0 0F1 0B0", "1F0 1B0 1F1 1B1 0B1"], "stage 0 is on 2 workers"),
    ],
)
def test_work_that_is_missing_too_much_or_misplaced_is_refused(orders: list[str], reason: str) -> None:
    """By its name."""
    with pytest.raises(BadInput, match=f"drawn can't be used: {reason}"):
        validate(read(*orders))


@pytest.mark.parametrize(
    ("orders", "waits"),
    [
        (["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], "0B0 for 1I0; 1F1 for 0F1"),
        (["0B0 0F0 0F1 0B1", "1F0 1B0 1F1 1B1"], "0B0 for 0F0; 1F0 for 0F0"),
        (["0F0 0F1 0W0 0I0 0B1", "1F0 1B0 1F1 1B1"], "0W0 for 0I0"),
    ],
)
def test_workers_that_wait_for_each_other_are_refused(orders: list[str], waits: str) -> None:
    """Saying who waits for what, also where only the time is asked for."""
    for check in (validate, simulate):
        with pytest.raises(BadInput, match=f"drawn can't go on: {waits}$"):
            check(read(*orders))


def test_a_step_cannot_begin_inside_the_one_before() -> None:
    """Unless its weights may be a version old."""
    orders = ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]
    validate(read(*orders, microbatches=1, steps=3, delay=1))
    with pytest.raises(BadInput, match="0F1 for version 1"):
        validate(read(*orders, microbatches=1, steps=3))
