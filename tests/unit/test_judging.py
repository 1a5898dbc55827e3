"""What the gate decides by."""

from __future__ import annotations

import json
import math

import pytest

from lemix_coordinator.operations.judging import is_good_enough, mean_loss


@pytest.mark.parametrize(
    ("loss", "against", "margin", "is_good"),
    [
        (2.0, 2.0, 0.0, True),
        (2.1, 2.0, 0.0, False),
        (2.1, 2.0, 0.2, True),
        (math.nan, 2.0, 9.0, False),
        (math.inf, 2.0, 9.0, False),
        (2.0, math.nan, 0.0, True),
        (math.nan, math.nan, 0.0, False),
    ],
)
def test_a_version_may_be_worse_by_the_margin(
    loss: float, against: float, margin: float, *, is_good: bool
) -> None:
    """One whose loss isn't a number is never served; one that is better than nothing is."""
    assert is_good_enough(loss, against, margin) == is_good


def test_the_loss_is_the_mean_over_tokens() -> None:
    """A longer reference counts for more."""
    results = [{"result": json.dumps({"logprobs": logprobs})} for logprobs in ([-1.0], [-2.0, -3.0, -4.0])]
    assert mean_loss(results) == 2.5
