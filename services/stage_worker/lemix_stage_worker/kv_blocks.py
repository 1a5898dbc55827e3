"""Which blocks of a node's key-value cache belong to whom: the same ids on every stage, decided at stage 0.

The cache of a stage is an array of blocks of `BLOCK_TOKENS` tokens. A sequence owns a list of them, its *block table*.
A full block of known content can be found again by its hash, which covers everything before it and the weight version:
a prompt that begins like an earlier one begins with the blocks of that one. Such a block is owned by several, and once
by nobody it stays until its place is needed, the longest unused first (as in vLLM's prefix caching, Kwon et al., SOSP
2023).

A sequence's blocks lie in a row where that can be had: attention reads a row of blocks in place, and has to copy what
is scattered.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

BLOCK_TOKENS: Final = 16
_EVICTED_AT_ONCE: Final = 8
"""Blocks are given up a few at a time, so that a sequence that grows finds several in a row."""
_HASH_BYTES: Final = 16

BlockHash = bytes
"""Names a block's content and all that is before it, on one weight version."""


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-num_tokens // BLOCK_TOKENS)


def root_hash(version: str) -> BlockHash:
    """What is before the first block of a sequence on this version."""
    return hashlib.blake2b(version.encode(), digest_size=_HASH_BYTES).digest()


def next_hash(before: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of a block of these tokens behind another one."""
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    return hashlib.blake2b(before + content, digest_size=_HASH_BYTES).digest()


@dataclass
class BlockPool:
    """The blocks of one node."""

    num_blocks: int
    _owners: np.ndarray = field(init=False)
    """By block, how many own it."""
    _hash_of: dict[int, BlockHash] = field(default_factory=dict)
    _block_of: dict[BlockHash, int] = field(default_factory=dict)
    _unused: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Blocks of known content that nobody owns, the longest unused first."""
    _num_owned: int = 0

    def __post_init__(self) -> None:
        self._owners = np.zeros(self.num_blocks, dtype=np.int32)

    @property
    def num_owned(self) -> int:
        """Blocks that somebody owns."""
        return self._num_owned

    @property
    def num_free(self) -> int:
        """Blocks that can be had."""
        return self.num_blocks - self._num_owned

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks that hold the longest known beginning; they are nobody's until they are taken (see `own`)."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def own(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            if not self._owners[block]:
                self._num_owned += 1
                self._unused.pop(block, None)
            self._owners[block] += 1

    def disown(self, blocks: Sequence[int]) -> None:
        """One owner less for each; a sequence's last block is the first to be given up."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if not self._owners[block]:
                self._num_owned -= 1
                if block in self._hash_of:
                    self._unused[block] = None

    def allocate(self, count: int, *, behind: int | None = None) -> list[int] | None:
        """So many blocks of unknown content, owned once, in a row as far as possible; None if there are too few.

        ``behind``: the block they follow, if they can.
        """
        if count > self.num_free:
            return None
        if count == 1 and behind is not None and self._is_blank(behind + 1):
            blocks = [behind + 1]
        else:
            blanks = self.num_free - len(self._unused)
            if blanks < count:
                self._evict(max(count - blanks, min(_EVICTED_AT_ONCE, len(self._unused))))
            blocks = self._choose(count, behind)
        for block in blocks:
            self._owners[block] = 1
        self._num_owned += count
        return blocks

    def remember(self, block: int, block_hash: BlockHash) -> None:
        """A block is full, and what it holds is known; of two with the same content the first can be found."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_all(self) -> None:
        """Nothing can be found again; owners keep what they own."""
        self._hash_of.clear()
        self._block_of.clear()
        self._unused.clear()

    def _is_blank(self, block: int) -> bool:
        return block < self.num_blocks and not self._owners[block] and block not in self._hash_of

    def _evict(self, count: int) -> None:
        for _ in range(count):
            block, _ = self._unused.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]

    def _choose(self, count: int, behind: int | None) -> list[int]:
        """Blank blocks: behind the given one, then from the longest runs, so that others find room to grow."""
        is_blank = self._owners == 0
        if self._unused:
            is_blank[list(self._unused)] = False
        chosen: list[int] = []
        while (
            behind is not None
            and len(chosen) < count
            and behind + 1 < self.num_blocks
            and is_blank[behind + 1]
        ):
            behind += 1
            chosen.append(behind)
        is_blank[chosen] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([0], is_blank.view(np.int8), [0]))))
        begins, ends = edges[::2], edges[1::2]
        for run in np.argsort(begins - ends, kind="stable"):
            missing = count - len(chosen)
            if not missing:
                break
            begin, end = int(begins[run]), int(ends[run])
            if not chosen and begin > 0 and end - begin >= 2 * missing:
                begin += (end - begin - missing) // 2  # whoever ends before it may grow, too
            chosen += range(begin, min(end, begin + missing))
        return chosen
