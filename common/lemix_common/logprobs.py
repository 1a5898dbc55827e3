"""A generated token's log-probability, as it travels from the last stage to the client and is kept beside the token.

It is one short text a token, which nobody between the two ends reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

_DIGITS = 6


class TokenLogprob(NamedTuple):
    """What the model itself thought, before temperature, penalties and limits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, best first, each with its log-probability."""

    def to_text(self) -> str:
        """JSON: ``[token, logprob, [[token, logprob], …]]``, rounded to six digits."""
        top = [[token, _rounded(logprob)] for token, logprob in self.top]
        return json.dumps([self.token, _rounded(self.logprob), top], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> TokenLogprob:
        """Read `to_text`."""
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, entry: Sequence[Any]) -> TokenLogprob:
        """The same, of JSON that is read already."""
        token, logprob, top = entry
        return cls(int(token), float(logprob), tuple((int(other), float(its)) for other, its in top))


def _rounded(logprob: float) -> float:
    return round(logprob, _DIGITS) + 0.0  # no negative zero
