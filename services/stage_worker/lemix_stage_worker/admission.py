"""Whose turn it is among requests that wait: the urgent first, and who waits becomes urgent.

A step of priority is worth `AGEING_S` of waiting. So a request is overtaken only by those that come less than
`AGEING_S` times the difference of their priorities after it: with priorities from -10 to 10, the least urgent one by
those of its next 100 s, and by none after that, however many come. Among equals, the first comes first.

Since all age alike, two that wait never change places: their order is a number that each has from the beginning
(`turn`), and a heap of these numbers is in order at any time.
"""

from __future__ import annotations

from collections.abc import Mapping

AGEING_S = 5.0
"""Seconds of waiting that count as much as one step of priority."""


def rank(priority: int, waited_s: float) -> float:
    """How urgent a request is now, in steps of priority; the higher goes first."""
    return priority + waited_s / AGEING_S


def turn(fields: Mapping[str, str]) -> float:
    """When one of priority 0 would have had to come to be as urgent, in the broker's seconds; the lower goes first.

    ``fields`` are an item's, or those of its entry in a node's stream: ``priority`` (none: 0) and ``accepted_at``.
    """
    return float(fields.get("accepted_at") or 0) - AGEING_S * int(fields.get("priority") or 0)
