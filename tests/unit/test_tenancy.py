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
