"""Training is a tenant of the compute loop: what it is due where serving leaves it nothing, and what serving waited.

Training takes the time that serving leaves over. If serving leaves none, training is due a least share all the same, so
that it can't starve: each second of serving that training waited through earns it credit, and a piece of training that
serving waited through spends it. A piece can't be cut, so credit may fall below zero, and is earned back before the
next one: over any while the share is kept to a piece.

Where requests go round through several stages, a stage's next serving step is often a moment away when it has none. A
piece of training begun then would hold it up for most of its length. So training waits for that moment first, where the
last ones were short beside a piece: anticipatory scheduling (Iyer & Druschel, SOSP 2001).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Final

_REMEMBERED: Final = 256
_TYPICAL: Final = 32
"""Gaps and pieces that tell what the next ones will be like."""
_MOST_GAPS: Final = 0.75
"""Of the last gaps between serving steps, so many end within what training waits for."""


@dataclass
class Tenancy:
    """Owned by the compute loop. Times are the worker's clock's, in seconds."""

    least_share: float
    """Of the time in which both want to compute, what training gets; 0: none."""
    most_credit_s: float = 0.02
    """What training has not used soon it doesn't get later: a long debt paid at once would block a request."""
    _credit_s: float = 0.0
    _trained: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """When training ran lately: enough to tell what a step waited."""
    _gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TYPICAL))
    """From the end of a serving step to when the next one could have begun."""
    _served_until: float | None = None

    @property
    def is_training_due(self) -> bool:
        """Training goes first now, though serving waits."""
        return self._credit_s > 0

    def patience_s(self, now: float) -> float:
        """How much longer training waits for the next serving step, if none is there; 0: it needn't.

        As long as most gaps lately, if that is less than half a piece of training, which it would wait for otherwise.
        """
        if self._served_until is None or self.is_training_due:
            return 0.0
        return max(0.0, self._served_until + self._likely_gap_s() - now)

    def serving_begins(self, ready_at: float) -> None:
        """A serving step begins that could have since then."""
        if self._served_until is not None:
            self._gaps_s.append(max(0.0, ready_at - self._served_until))

    def count(self, began: float, ended: float, *, is_training: bool, is_awaited: bool) -> None:
        """Note what ran; ``is_awaited``: serving waited for training meanwhile, or training for serving."""
        if is_training:
            self._trained.append((began, ended))
            if is_awaited:
                self._credit_s -= ended - began
            return
        self._served_until = ended
        if is_awaited:
            self.earn(ended - began)

    def earn(self, waited_s: float) -> None:
        """Training waited so long for serving: for a step that ran, or for one that hadn't come yet."""
        earned_s = waited_s * self.least_share / (1 - self.least_share)
        self._credit_s = min(max(self.most_credit_s, earned_s), self._credit_s + earned_s)

    def _likely_gap_s(self) -> float:
        """0 where gaps are no shorter than what is worth to wait for."""
        if not self._gaps_s or not self._trained:
            return 0.0
        pieces = islice(reversed(self._trained), _TYPICAL)
        gaps = sorted(self._gaps_s)
        gap_s = gaps[int(_MOST_GAPS * (len(gaps) - 1))]
        return gap_s if gap_s < median(ended - began for began, ended in pieces) / 2 else 0.0

    def blocked_s(self, ready_at: float, began: float) -> float:
        """How long a step that was ready waited while training ran."""
        return sum(max(0.0, min(ended, began) - max(started, ready_at)) for started, ended in self._trained)
