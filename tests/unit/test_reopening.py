"""What a closed cluster refuses is asked again, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from lemix.reopening import FIRST_DELAY_S, LONGEST_DELAY_S, until_open
from lemix_common.clock import ManualClock
from lemix_common.errors import QueueFull, ShuttingDown


def open_after(clock: ManualClock, opens_at: float, asked_at: list[float]) -> Callable[[], str]:
    """A cluster that accepts from then on, and notes when it was asked."""

    def attempt() -> str:
        asked_at.append(clock.now())
        if clock.now() < opens_at:
            raise ShuttingDown("not yet")
        return "accepted"

    return attempt


def test_it_is_asked_ever_less_often_until_it_opens() -> None:
    """After 0.1 s, then twice as late each time, at most every 2 s; the answer is the attempt's."""
    clock, asked_at = ManualClock(), list[float]()
    assert until_open(open_after(clock, 8.0, asked_at), clock=clock, patience_s=60.0) == "accepted"
    waits = [later - earlier for earlier, later in pairwise(asked_at)]
    assert waits[0] == FIRST_DELAY_S
    assert waits == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S]
    )


def test_a_cluster_that_stays_closed_is_given_up() -> None:
    """Its refusal is the error, once the patience is over and not before."""
    clock, asked_at = ManualClock(), list[float]()
    with pytest.raises(ShuttingDown, match="not yet"):
        until_open(open_after(clock, 1e9, asked_at), clock=clock, patience_s=10.0)
    assert 10.0 <= asked_at[-1] <= 10.0 + LONGEST_DELAY_S


def test_other_refusals_are_the_callers() -> None:
    """A full queue is no closed cluster: it is raised at once."""
    clock = ManualClock()

    def full() -> None:
        raise QueueFull(5, 1.0)

    with pytest.raises(QueueFull):
        until_open(full, clock=clock, patience_s=10.0)
    assert clock.now() == 0.0
