"""How the next token is chosen, as the client asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lemix_common.errors import BadInput

_SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Greedy by default; with a temperature, a choice that the seed and the token's position fix."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens may be chosen; 0 is no limit."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that together have this probability may be chosen."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"temperature {self.temperature} can't be used: give a finite number, 0 or more")
        if self.top_k < 0:
            raise BadInput(f"top_k {self.top_k} can't be used: give 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p {self.top_p} can't be used: give a number above 0, up to 1")
        if not 0 <= self.seed < _SEEDS:
            raise BadInput(f"seed {self.seed} can't be used: give a whole number from 0 to 2**64 - 1")

    @property
    def is_greedy(self) -> bool:
        """No noise: the most likely token, whatever the seed."""
        return self.temperature == 0


GREEDY = Sampling()
