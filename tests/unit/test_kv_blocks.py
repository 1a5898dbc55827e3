"""Blocks of a cache: nobody's block is handed out twice, and what is known can be found while it is there."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lemix_stage_worker.batching import Member
from lemix_stage_worker.kv_blocks import (
    BLOCK_TOKENS,
    BlockHash,
    BlockPool,
    next_hash,
    num_blocks_for,
    root_hash,
)


@dataclass
class Model:
    """What a pool should do, in the simplest words, beside the pool that does it."""

    pool: BlockPool
    owners: Counter[int] = field(default_factory=Counter)
    content: OrderedDict[int, BlockHash] = field(default_factory=OrderedDict)
    """Blocks of known content; those without an owner in the order in which they lost their last one."""
    sequences: list[list[int]] = field(default_factory=list)
    """Block tables that own their blocks."""

    @property
    def owned(self) -> set[int]:
        """Blocks with an owner."""
        return {block for block, count in self.owners.items() if count}

    @property
    def unused(self) -> list[int]:
        """Known blocks that nobody owns, the longest unused first."""
        return [block for block in self.content if block not in self.owned]

    def begin(self, count: int) -> None:
        """A sequence asks for its first blocks."""
        if (blocks := self._allocate(count, behind=None)) is not None:
            self.sequences.append(blocks)

    def grow(self, index: int, count: int) -> None:
        """A sequence asks for more."""
        if self.sequences:
            sequence = self.sequences[index % len(self.sequences)]
            sequence += self._allocate(count, behind=sequence[-1]) or []

    def share(self, text: int) -> None:
        """A sequence takes over what is known of a text, in whichever order it became so."""
        found = self.pool.find(names(text, 9))
        known = {block_hash: block for block, block_hash in self.content.items()}
        expected: list[int] = []
        for block_hash in names(text, 9):
            if block_hash not in known:
                break
            expected.append(known[block_hash])
        assert found == expected
        if found:
            self.pool.own(found)
            self.owners.update(found)
            self.sequences.append(found)

    def fill(self, index: int, text: int) -> None:
        """A sequence's blocks turn out to be the beginning of a text."""
        if not self.sequences:
            return
        sequence = self.sequences[index % len(self.sequences)]
        for block, block_hash in zip(sequence, names(text, len(sequence)), strict=True):
            if block in self.content:
                continue  # what is written once is never written again
            self.pool.remember(block, block_hash)
            if block_hash not in self.content.values():
                self.content[block] = block_hash

    def leave(self, index: int) -> None:
        """A sequence ends."""
        if self.sequences:
            blocks = self.sequences.pop(index % len(self.sequences))
            self.pool.disown(blocks)
            for block in reversed(blocks):
                self.owners[block] -= 1
                if not self.owners[block] and block in self.content:
                    self.content.move_to_end(block)

    def forget(self, _: int) -> None:
        """Nothing is trusted any more."""
        self.pool.forget_all()
        self.content.clear()

    def _allocate(self, count: int, *, behind: int | None) -> list[int] | None:
        unused, owned = self.unused, self.owned
        num_blank = self.pool.num_blocks - len(owned) - len(unused)
        blocks = self.pool.allocate(count, behind=behind)
        if count > self.pool.num_blocks - len(owned):
            assert blocks is None
            return None
        assert blocks is not None
        assert len(set(blocks)) == len(blocks) == count
        assert not owned & set(blocks), "it was somebody's"
        assert all(0 <= block < self.pool.num_blocks for block in blocks)
        gone = [block for block in unused if not self._is_known(block)]
        assert gone == unused[: len(gone)], "the longest unused go first"
        assert (num_blank >= count) <= (gone == []), "nothing is given up without need"
        assert set(blocks).isdisjoint(set(unused) - set(gone))
        for block in gone:
            del self.content[block]
        self.owners.update(blocks)
        return blocks

    def _is_known(self, block: int) -> bool:
        return self.pool._block_of.get(self.content[block]) == block

    def check(self) -> None:
        """The counts, and that whatever is owned and known can be found."""
        assert self.pool.num_owned == len(self.owned)
        assert self.pool.num_free == self.pool.num_blocks - len(self.owned)
        assert all(self._is_known(block) for block in self.content)


def block_hashes(version: str, tokens: list[int]) -> list[BlockHash]:
    """What a request with these tokens calls its full blocks."""
    member = Member(number=0, version=version, ids=tokens, turn=0.0, ready_at=0.0)
    return [member.hash_upto(count) for count in range(1, len(tokens) // BLOCK_TOKENS + 1)]


def names(text: int, count: int) -> list[BlockHash]:
    """The hashes of a text's first blocks."""
    return block_hashes("0.1", [text * 1000 + position for position in range(count * BLOCK_TOKENS)])


Step = Callable[[Model], None]


def _steps() -> st.SearchStrategy[list[Step]]:
    counts, indices, texts = st.integers(1, 6), st.integers(0, 9), st.integers(0, 2)
    return st.lists(
        st.one_of(
            st.builds(lambda count: lambda model: model.begin(count), counts),
            st.builds(lambda index, count: lambda model: model.grow(index, count), indices, counts),
            st.builds(lambda text: lambda model: model.share(text), texts),
            st.builds(lambda index, text: lambda model: model.fill(index, text), indices, texts),
            st.builds(lambda index: lambda model: model.leave(index), indices),
            st.builds(lambda index: lambda model: model.leave(index), indices),
            st.just(lambda model: model.forget(0)),
        ),
        max_size=60,
    )


@given(steps=_steps(), num_blocks=st.sampled_from([1, 5, 12, 40]))
@settings(max_examples=150, deadline=None)
def test_a_pool_does_what_a_simple_model_says(steps: list[Step], num_blocks: int) -> None:
    """Whoever begins, grows, shares, ends: no owned block is handed out, counts are right, known blocks are found."""
    model = Model(BlockPool(num_blocks))
    for step in steps:
        step(model)
        model.check()
    while model.sequences:
        model.leave(0)
    model.check()
    assert model.pool.num_owned == 0


def test_blocks_of_a_sequence_lie_in_a_row() -> None:
    """A fresh one's do, and those that four sequences get one by one while all of them grow."""
    pool = BlockPool(64)
    sequences = [pool.allocate(3) or [] for _ in range(4)]
    for _ in range(5):
        for sequence in sequences:
            sequence.extend(pool.allocate(1, behind=sequence[-1]) or [])
    for sequence in sequences:
        assert [after - before for before, after in pairwise(sequence)] == [1] * 7


def test_what_has_no_room_behind_it_is_in_few_pieces() -> None:
    """The longest runs are used first."""
    pool = BlockPool(12)
    taken = pool.allocate(12) or []
    pool.disown([block for block in taken if block not in (2, 5)])  # runs of 2, 2 and 6
    found = pool.allocate(8) or []
    assert sorted(found[:6]) == found[:6] == list(range(6, 12))
    assert len(found) == 8


def test_the_longest_unused_content_makes_room_its_end_first() -> None:
    """So what is left of a text is its beginning, which can still be found."""
    pool = BlockPool(12)
    blocks = pool.allocate(12) or []
    for block, block_hash in zip(blocks, names(0, 12), strict=True):
        pool.remember(block, block_hash)
    pool.disown(blocks)
    assert pool.find(names(0, 12)) == blocks
    pool.allocate(1)
    assert pool.find(names(0, 12)) == blocks[:4]  # eight at once


def test_a_hash_covers_everything_before_it_and_the_version() -> None:
    """Equal blocks behind different beginnings, or on different weights, have different names."""
    same = [7] * BLOCK_TOKENS
    behind = [block_hashes("0.1", [start] * BLOCK_TOKENS + same)[1] for start in (1, 2)]
    assert behind[0] != behind[1]
    assert next_hash(root_hash("0.1"), same) != next_hash(root_hash("0.2"), same)
    assert len(block_hashes("0.1", same[:-1])) == 0
    assert [num_blocks_for(count) for count in (0, 1, 16, 17)] == [0, 1, 1, 2]
