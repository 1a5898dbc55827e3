"""Training is a tenant of the compute loop: what it is due where serving leaves it nothing, and what serving waited.

Training takes the time that serving leaves over. If serving leaves none, training is due a least share all the same, so
that it can't starve: each second of serving that training waited through earns it credit, and a piece of training that
serving waited through spends it. A piece can't be cut, so credit may fall below zero, and is earned back before the
next one: over any while the share is kept to a piece.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

_REMEMBERED: Final = 256


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

    @property
    def is_training_due(self) -> bool:
        """Training goes first now, though serving waits."""
        return self._credit_s > 0

    def count(self, began: float, ended: float, *, is_training: bool, is_awaited: bool) -> None:
        """Note what ran; ``is_awaited``: serving waited for training meanwhile, or training for serving."""
        if is_training:
            self._trained.append((began, ended))
            if is_awaited:
                self._credit_s -= ended - began
        elif is_awaited:
            earned_s = (ended - began) * self.least_share / (1 - self.least_share)
            self._credit_s = min(max(self.most_credit_s, earned_s), self._credit_s + earned_s)

    def blocked_s(self, ready_at: float, began: float) -> float:
        """How long a step that was ready waited while training ran."""
        return sum(max(0.0, min(ended, began) - max(started, ready_at)) for started, ended in self._trained)
