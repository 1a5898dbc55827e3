"""What a drain costs: only time in which requests of two versions took turns, though they could have shared."""

from __future__ import annotations

import pytest

from lemix_coordinator.drains import Drains


@pytest.mark.parametrize(
    ("in_flight", "divided_s"),
    [
        ({"0.1": "3", "0.2": "2"}, 4.0),
        ({"0.1": "1", "0.2": "1"}, 0.0),
        ({"0.1": "5", "0.2": "0"}, 0.0),
        ({"0.1": "0", "0.2": "5"}, 0.0),
    ],
    ids=["both run", "each has a pass of its own", "only the old one", "only the new one"],
)
def test_only_time_that_requests_lose_is_counted(in_flight: dict[str, str], divided_s: float) -> None:
    """On two stages, four seconds in looks of half a second; then one without a drain."""
    drains = Drains()
    for look in range(9):
        drains.look(in_flight, "0.1", 10 + look / 2, num_stages=2)
    drains.look({"0.2": "7"}, "", 20.0, num_stages=2)
    assert (drains.divided_s, drains.undivided_s) == (divided_s, 10.0 - divided_s)


def test_each_drain_counts_by_itself() -> None:
    """What the one before cost was waited for."""
    drains = Drains()
    for look, draining in enumerate(["0.1", "0.1", "", "0.2", "0.2"]):
        drains.look({"0.1": "2", "0.2": "2"}, draining, float(look), num_stages=2)
    assert (drains.divided_s, drains.undivided_s) == (2.0, 0.0)
