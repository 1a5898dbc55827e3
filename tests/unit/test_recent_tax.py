"""The training tax of the last seconds, from sums that only grow."""

from __future__ import annotations

from typing import Any

import pytest

from lemix_coordinator.reader import TAX_WINDOW_S, Reader

NOBODY: Any = None


def test_only_requests_that_ended_lately_count() -> None:
    """What was waited long ago, before this coordinator began or before the window, is not in it."""
    reader = Reader(NOBODY, NOBODY)

    def tax(now: float, blocked_s: float, response_s: float) -> float:
        return reader._recent_tax({"blocked_s": str(blocked_s), "response_s": str(response_s)}, now)

    assert tax(0, 90.0, 100.0) == 0
    assert tax(1, 90.0, 100.0) == 0
    assert tax(2, 91.0, 111.0) == pytest.approx(1 / 10)
    assert tax(3, 91.0, 121.0) == pytest.approx(1 / 20)
    assert tax(2.5 + TAX_WINDOW_S, 91.0, 131.0) == pytest.approx(0)
    assert tax(20, 91.0, 131.0) == 0


def test_a_fresh_cluster_has_no_tax() -> None:
    """Its totals are empty."""
    assert Reader(NOBODY, NOBODY)._recent_tax({}, 0.0) == 0
