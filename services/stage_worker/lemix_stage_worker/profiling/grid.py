"""What is measured: passes of these sequences, chosen so that what a token and what a context costs can be told apart.

Sequences of one length tell only their sum: a row of eight of 64 tokens beside one of 512 tells which is which. Decodes
are as they come: any number of rows, each of another length. They are drawn, once and for all, so that no profile is of
other passes than another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for

Kind = Literal["prompt", "score", "train", "decode"]

REFERENCE_SHARE: Final = 3
"""Of a score's and an example's tokens, one in so many is its reference (as in HH-RLHF, on average)."""
_ALONE: Final = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_TOGETHER: Final = ((16,) * 4, (32,) * 4, (32,) * 8, (64,) * 4, (128,) * 4, (256,) * 2, (48, 200), (300, 100))
_ROWS: Final = 64
"""The most of an iteration; as many cells, from one row to this."""
_SHORTEST: Final = 32
_LONGEST: Final = 1024
"""Tokens that a row of a decode attends to."""
_QUICK_TOKENS: Final = 256
_QUICK_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One pass."""

    kind: Kind
    lengths: tuple[int, ...]
    """Tokens of each sequence; of a decode, what each row attends to, its own token included."""

    @property
    def tokens(self) -> int:
        """That are computed."""
        return len(self.lengths) if self.kind == "decode" else sum(self.lengths)

    @property
    def contexts(self) -> int:
        """Σ(length · context)."""
        return sum(self.lengths) if self.kind == "decode" else sum(length**2 for length in self.lengths)


def grid(*, context_length: int, cache_tokens: int, quick: bool = False) -> tuple[Cell, ...]:
    """The cells that a model's context and a cache of so many tokens allow, in the order of their tokens.

    No row is longer than the cache, and none has a reference of less than a token.
    """
    longest = min(context_length, cache_tokens)
    most = min(cache_tokens, _QUICK_TOKENS) if quick else cache_tokens
    rows = [(length,) for length in _ALONE] + list(_TOGETHER)
    rows = [lengths for lengths in rows if sum(lengths) <= most and max(lengths) <= longest]
    most_rows = _QUICK_ROWS if quick else _ROWS
    iterations = [
        _iteration(rows, min(longest, _LONGEST), cache_tokens, random.Random(rows))
        for rows in range(1, most_rows + 1)
    ]
    kinds: tuple[Kind, ...] = ("prompt", "score", "train")
    cells = [Cell(kind, lengths) for kind in kinds for lengths in rows]
    cells += [Cell("decode", lengths) for lengths in iterations if lengths]
    return tuple(sorted(cells, key=lambda cell: (cell.kind, cell.tokens, cell.contexts)))


def _iteration(rows: int, longest: int, cache_tokens: int, drawn: random.Random) -> tuple[int, ...]:
    """What each row attends to, as in a running cluster: all of them other lengths; () if so many rows are too many.

    Up to a limit which is drawn, too, so that contexts and rows don't rise together.
    """
    shortest = min(_SHORTEST, longest)
    most = min(longest, 2 * cache_tokens // rows - shortest)
    if most < shortest:
        return ()
    limit = shortest * (most / shortest) ** drawn.random()
    lengths = tuple(drawn.randint(shortest, round(limit)) for _ in range(rows))
    return lengths if _cached(lengths) <= cache_tokens else _iteration(rows, longest, cache_tokens, drawn)


def _cached(lengths: Sequence[int]) -> int:
    """Tokens of the cache that they take, in whole blocks."""
    return sum(num_blocks_for(length) * BLOCK_TOKENS for length in lengths)
