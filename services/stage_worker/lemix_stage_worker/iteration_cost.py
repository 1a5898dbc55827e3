"""How long an iteration takes, told by those before it: what sizes the chunks of prompts.

Seconds = c0 + c1 · tokens, fitted by least squares in which an older iteration counts less. What context costs is in
both; it changes slowly, and the fit follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UNKNOWN_TOKENS: Final = 32
"""Before anything was measured."""
_KEPT: Final = 0.97
"""What an iteration counts for beside the next one: the last thirty or so tell."""
_SPREAD: Final = 4.0
"""Tokens by which iterations have to differ for the difference to say anything."""


@dataclass
class IterationCost:
    """Of the slowest stage of a node."""

    _count: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_seconds: float = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """An iteration took so long on its slowest stage."""
        self._count = self._count * _KEPT + 1
        self._tokens = self._tokens * _KEPT + num_tokens
        self._seconds = self._seconds * _KEPT + seconds
        self._tokens_tokens = self._tokens_tokens * _KEPT + num_tokens**2
        self._tokens_seconds = self._tokens_seconds * _KEPT + num_tokens * seconds

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds of any iteration, and of each of its tokens; of iterations that are all alike, all is the tokens'."""
        if not self._count:
            return 0.0, 0.0
        tokens, seconds = self._tokens / self._count, self._seconds / self._count
        variance = self._tokens_tokens / self._count - tokens**2
        slope = (self._tokens_seconds / self._count - tokens * seconds) / max(variance, 1e-9)
        if variance < _SPREAD**2 or slope <= 0:
            return 0.0, seconds / tokens
        return max(0.0, seconds - slope * tokens), slope

    def more_tokens_within(self, limit_s: float) -> int:
        """The most tokens by which an iteration takes no longer than this more."""
        _, token_s = self.coefficients
        return int(limit_s / token_s) if token_s else UNKNOWN_TOKENS
