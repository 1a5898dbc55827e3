from __future__ import annotations

import random

from lemix_stage_worker.admission import AGEING_S, rank, turn

LOWEST, HIGHEST = -10, 10


def entry(priority: int, accepted_at: float) -> dict[str, str]:
    """What an item's fields say of its turn."""
    return {"priority": str(priority), "accepted_at": f"{accepted_at:.3f}"}


def test_the_higher_priority_goes_first() -> None:
    """Of two that waited equally long; among equals, the one that came first."""
    assert rank(1, 3.0) > rank(0, 3.0)
    assert rank(0, 3.0) > rank(0, 2.0)
    assert turn(entry(1, 100.0)) < turn(entry(0, 100.0))
    assert turn(entry(0, 100.0)) < turn(entry(0, 100.1))


def test_a_turn_is_a_rank_without_a_clock() -> None:
    """Whenever one looks, the order by turns is the order by ranks."""
    draw = random.Random(7)
    waiting = [(draw.randint(LOWEST, HIGHEST), draw.uniform(1000.0, 1200.0)) for _ in range(200)]
    by_turn = sorted(waiting, key=lambda item: turn(entry(*item)))
    for now in (1200.0, 2000.0):
        by_rank = sorted(waiting, key=lambda item: -rank(item[0], now - item[1]))
        assert [round(accepted, 2) for _, accepted in by_rank] == [round(a, 2) for _, a in by_turn]


def test_nobody_waits_for_ever() -> None:
    """One of the lowest priority goes before whatever comes more than 20 steps of ageing after it."""
    first = turn(entry(LOWEST, 1000.0))
    bound_s = AGEING_S * (HIGHEST - LOWEST)
    assert bound_s == 100.0
    assert turn(entry(HIGHEST, 1000.0 + bound_s - 1.0)) < first
    assert turn(entry(HIGHEST, 1000.0 + bound_s + 1.0)) > first


def test_an_item_that_says_nothing_has_priority_0() -> None:
    """And one whose arrival isn't known was there first."""
    assert turn({"accepted_at": "5.0"}) == 5.0
    assert turn({}) == 0.0
