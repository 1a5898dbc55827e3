"""What training gets where serving wants all, and what serving is said to have waited."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_stage_worker.tenancy import Tenancy

PIECES_S = st.floats(1e-3, 0.05)


@given(st.floats(0.01, 0.5), st.lists(st.tuples(PIECES_S, PIECES_S), min_size=50, max_size=200))
def test_training_gets_its_least_share_of_a_busy_stage(
    share: float, pieces: list[tuple[float, float]]
) -> None:
    """With serving and training always waiting: the share is kept to within a piece, however long pieces are."""
    tenancy, now, trained = Tenancy(share), 0.0, 0.0
    for serving_s, training_s in pieces:
        is_training = tenancy.is_training_due
        took = training_s if is_training else serving_s
        tenancy.count(now, now + took, is_training=is_training, is_awaited=True)
        now += took
        trained += took * is_training
    assert abs(trained - share * now) <= 0.05


def test_serving_that_nobody_waits_for_earns_nothing() -> None:
    """Training that had nothing to do isn't due later."""
    tenancy = Tenancy(0.5)
    tenancy.count(0, 60, is_training=False, is_awaited=False)
    assert not tenancy.is_training_due


def test_credit_is_not_saved_up() -> None:
    """After a long while of serving training isn't due more than a moment at once."""
    tenancy = Tenancy(0.5)
    for hundredth in range(6000):
        tenancy.count(hundredth / 100, hundredth / 100 + 0.01, is_training=False, is_awaited=True)
    assert tenancy.is_training_due
    tenancy.count(60, 60 + tenancy.most_credit_s, is_training=True, is_awaited=True)
    assert not tenancy.is_training_due


def served_at_intervals(gap_s: float, *, training_s: float) -> Tenancy:
    """A stage whose serving steps of 10 ms came so long after one another; the last one ended at 0."""
    tenancy = Tenancy(0.05)
    tenancy.count(-100.0, -100.0 + training_s, is_training=True, is_awaited=False)
    for number in range(-40, 0):
        ready_at = number * (0.01 + gap_s) + gap_s
        tenancy.serving_begins(ready_at)
        tenancy.count(ready_at, ready_at + 0.01, is_training=False, is_awaited=False)
    return tenancy


def test_training_waits_for_a_step_that_comes_soon() -> None:
    """As long as steps were apart lately, if it would hold them up longer; then it goes on, and is due by and by."""
    tenancy = served_at_intervals(0.003, training_s=0.015)
    assert tenancy.patience_s(0.001) == pytest.approx(0.002)
    assert tenancy.patience_s(0.0031) == 0.0
    tenancy.earn(0.003)
    assert tenancy.is_training_due
    assert tenancy.patience_s(0.001) == 0.0


@pytest.mark.parametrize("gap_s", [0.008, 0.5])
def test_training_uses_gaps_that_are_worth_it(gap_s: float) -> None:
    """Half a piece and more: a wait would cost more than it spares."""
    assert served_at_intervals(gap_s, training_s=0.015).patience_s(0.0) == 0.0


def test_without_a_least_share_serving_always_goes_first() -> None:
    """As the setting 0 says."""
    tenancy = Tenancy(0.0)
    tenancy.count(0, 60, is_training=False, is_awaited=True)
    assert not tenancy.is_training_due


def test_a_wait_is_all_the_training_between_readiness_and_begin() -> None:
    """In several pieces, with serving between them, and the part of a piece in which it became ready."""
    tenancy = Tenancy(0.1)
    for began, ended in ((0.0, 1.0), (2.0, 3.0), (5.0, 6.0)):
        tenancy.count(began, ended, is_training=True, is_awaited=True)
    assert tenancy.blocked_s(0.5, 3.5) == pytest.approx(1.5)
    assert tenancy.blocked_s(2.25, 2.25) == 0.0
    assert tenancy.blocked_s(7.0, 9.0) == 0.0
