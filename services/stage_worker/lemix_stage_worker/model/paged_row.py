"""What an iteration computes of one sequence, and where in the cache its keys and values are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from lemix_stage_worker.kv_blocks import BLOCK_TOKENS

Extent = tuple[int, int]
"""A run of slots (one a token), from and to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRow:
    """Consecutive tokens of one sequence in an iteration."""

    start: int
    """The position of the first of them."""
    length: int
    blocks: tuple[int, ...]
    """The sequence's block table, up to its last token here."""

    @property
    def end(self) -> int:
        """Tokens of the sequence that are known after them."""
        return self.start + self.length

    def extents(self, *, first: int = 0) -> list[Extent]:
        """Runs of neighbouring blocks as runs of slots, from a position up to the row's end."""
        blocks = self.blocks[first // BLOCK_TOKENS :]
        begin = first - first % BLOCK_TOKENS
        breaks = [
            index for index, (before, block) in enumerate(pairwise(blocks), start=1) if block != before + 1
        ]
        runs = pairwise([0, *breaks, len(blocks)])
        extents = [
            (
                blocks[a] * BLOCK_TOKENS,
                blocks[a] * BLOCK_TOKENS + min(b * BLOCK_TOKENS, self.end - begin) - a * BLOCK_TOKENS,
            )
            for a, b in runs
        ]
        (start, end), *others = extents
        return [(start + first - begin, end), *others]
