"""What training is due on a stage where requests leave it no time: a least share, so that it can't starve.

As in the worker: each second of serving that training waited through earns training credit, a piece of training that
serving waited through spends it; a piece isn't cut for it, so credit may fall below zero and is earned back first.
"""

from __future__ import annotations

from typing import Final

MOST_CREDIT_S: Final = 0.02
"""A long debt paid at once would block a request."""


class Credit:
    """Of one stage."""

    __slots__ = ("_earning", "_seconds")

    def __init__(self, least_share: float) -> None:
        self._earning = least_share / (1 - least_share)
        self._seconds = 0.0

    @property
    def is_due(self) -> bool:
        """Training goes first now, though a request waits."""
        return self._seconds > 0

    def count(self, seconds: float, *, is_training: bool, is_awaited: bool) -> None:
        """Note what ran; ``is_awaited``: the other kind waited for it."""
        if not is_awaited:
            return
        if is_training:
            self._seconds -= seconds
        else:
            earned = seconds * self._earning
            self._seconds = min(max(MOST_CREDIT_S, earned), self._seconds + earned)
