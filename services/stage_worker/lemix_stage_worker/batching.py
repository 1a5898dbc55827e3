"""What a node computes next of its requests: iteration-level batching over a paged cache, decided at stage 0.

An *iteration* is one hybrid batch on its way through the stages: the next token of some requests, and chunks of others'
prompts. Requests join and leave between iterations (Orca, Yu et al., OSDI 2022; chunks after Sarathi-Serve, Agrawal et
al., OSDI 2024). As many iterations are on their way as the node has workers, so the requests that decode go round in as
many groups: while one group is at stage 1, another one is at stage 0.

Decodes come first; beside them there is a chunk of prompts, of the first in line first, no larger than those who decode
may be asked to wait for, and never nothing. Memory is taken at stage 0 for all stages, whose caches have the same
blocks: for a prompt before its first chunk, for a decode block by block. Where none is left, the request that is last
in line gives its blocks up and is computed again later.

`paper` is the LeMix paper's rule (its Algorithm 3): one iteration at a time, whole prompts together with one step of
what runs, a batch of at most so many requests, which waits for more only so long.

Pure: time comes as an argument, and what is computed somewhere else.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal

from lemix_stage_worker.kv_blocks import (
    BLOCK_TOKENS,
    BlockHash,
    BlockPool,
    next_hash,
    num_blocks_for,
    root_hash,
)

LEAST_CHUNK: Final = 16
"""Tokens of prompts that an iteration takes at least, however many requests decode: nobody starves."""
WITHOUT_LIMIT: Final = 2**31

BatchingRule = Literal["iteration", "paper"]


class Wants(IntEnum):
    """What the last stage computes of a row."""

    NOTHING = 0
    TOKEN = 1
    SCORES = 2


@dataclass(eq=False)
class Member:
    """A request among those of its node: how far it is."""

    number: int
    """Its name on this node."""
    version: str
    """The weights it is computed on."""
    ids: list[int]
    """Everything known of its sequence: prompt, what has been generated, or what is to be scored."""
    turn: float
    """Its place in line; lower is earlier."""
    ready_at: float
    """Since when it could have been computed on."""
    scores_from: int | None = None
    """The position whose next token is the first to be scored; None: tokens are generated."""
    is_alone: bool = False
    """It gets iterations of its own: it may be what makes others fail."""
    num_planned: int = 0
    """Tokens that are computed, or on their way."""
    blocks: list[int] = field(default_factory=list)
    run: int = 0
    """Rises when it begins again: what was on its way by then counts no more."""
    is_awaited: bool = False
    """Its next token is on its way."""
    last_iteration: int = -1
    _hash: BlockHash = b""
    """Of its full blocks so far."""
    _num_hashed: int = 0

    def __lt__(self, other: Member) -> bool:
        return (self.turn, self.number) < (other.turn, other.number)

    @property
    def num_left(self) -> int:
        """Known tokens that nobody computes yet."""
        return len(self.ids) - self.num_planned

    @property
    def is_ready(self) -> bool:
        """There is something to compute of it."""
        return not self.is_awaited and self.num_left > 0

    @property
    def is_decode(self) -> bool:
        """Its next row is one token behind others, and chooses the one behind it."""
        return self.scores_from is None and self.num_left == 1 and self.num_planned > 0

    def hash_upto(self, num_blocks: int) -> BlockHash:
        """The hash of its first blocks, which are full."""
        if num_blocks < self._num_hashed or not self._hash:
            self._hash, self._num_hashed = root_hash(self.version), 0
        while self._num_hashed < num_blocks:
            start = self._num_hashed * BLOCK_TOKENS
            self._hash = next_hash(self._hash, self.ids[start : start + BLOCK_TOKENS])
            self._num_hashed += 1
        return self._hash

    def restart(self) -> None:
        """Begin again from nothing."""
        self.run += 1
        self.num_planned, self.blocks, self.is_awaited, self._hash = 0, [], False, b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """Consecutive tokens of one request."""

    member: Member
    run: int
    start: int
    length: int
    wants: Wants
    blocks: tuple[int, ...]
    """Of the sequence, up to its last token here."""
    ready_at: float

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.member.ids[self.start : self.start + self.length]

    @property
    def is_current(self) -> bool:
        """What becomes of it is still asked for."""
        return self.run == self.member.run


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """A hybrid batch of one weight version."""

    number: int
    version: str
    rows: tuple[PlannedRow, ...]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(row.length for row in self.rows)

    @property
    def contexts(self) -> int:
        """Σ(length · context) of its rows: their tokens times what is known after them."""
        return sum(row.length * (row.start + row.length) for row in self.rows)


@dataclass
class Batcher:
    """The requests of one node. Owned by the compute loop of its stage 0."""

    pool: BlockPool
    max_in_flight: int
    chunk: Callable[[], int]
    """Tokens of prompts in an iteration in which somebody decodes; it is asked each time."""
    max_tokens: int
    """Tokens of an iteration at most."""
    rule: BatchingRule = "iteration"
    max_batch: int = 16
    """`paper`: requests of a batch."""
    max_wait_s: float = 0.0
    """`paper`: how long an empty node waits for more than one request."""
    running: list[Member] = field(default_factory=list)
    """Those that own blocks, in the order in which they got them."""
    waiting: list[Member] = field(default_factory=list)
    """Those that own none, by their turn."""
    in_flight: dict[int, Iteration] = field(default_factory=dict)
    num_preempted: int = 0
    _left_behind: dict[int, list[int]] = field(default_factory=dict)
    """By iteration, blocks that are given up at its end."""
    _is_settling: bool = False
    """After a failure: nothing is planned until what is on its way has ended."""
    _next_number: int = 0

    # ---- who is there
    def add(self, member: Member) -> None:
        """Let a request take its place in line."""
        insort(self.waiting, member)

    def drop(self, member: Member) -> None:
        """Forget a request; its blocks are free when no iteration on its way names them."""
        if member in self.running:
            self.running.remove(member)
            self._give_up(member)
        elif member in self.waiting:
            self.waiting.remove(member)
        member.restart()

    def begin_again(self, member: Member, *, version: str | None = None) -> None:
        """Compute a request from its beginning (on another version), in its place in line."""
        self.drop(member)
        member.version = version or member.version
        self.add(member)

    def give_token(self, member: Member, token: int, now: float) -> None:
        """A request's next token was chosen; it can be computed on."""
        member.ids.append(token)
        member.is_awaited, member.ready_at = False, now

    # ---- what is computed
    @property
    def can_plan(self) -> bool:
        """There is room for another iteration, and somebody to be in it."""
        return self._has_room and any(member.is_ready for member in (*self.running, *self.waiting[:1]))

    @property
    def decodes(self) -> bool:
        """Somebody who has tokens waits for the next one."""
        return any(member.is_ready and member.is_decode for member in self.running)

    def plan_at(self) -> float | None:
        """When an iteration can be planned at the earliest; None: when something happens."""
        if not self.can_plan:
            return None
        if self.rule == "paper" and not self.running and len(self.waiting) < self.max_batch:
            return min(member.ready_at for member in self.waiting) + self.max_wait_s
        return 0.0

    def plan(self) -> Iteration | None:
        """The next iteration, on its way from now on; None if nobody can be in it."""
        if not self._has_room:
            return None
        rows: list[PlannedRow] = []
        num_preempted = -1
        while (
            not rows and num_preempted < self.num_preempted
        ):  # who was to be computed gave way to the others
            num_preempted = self.num_preempted
            rows = self._next_rows()
        if not rows:
            return None
        iteration = Iteration(number=self._next_number, version=rows[0].member.version, rows=tuple(rows))
        self._next_number += 1
        self.in_flight[iteration.number] = iteration
        return iteration

    def end(self, number: int) -> Iteration | None:
        """An iteration came to its end; None if it isn't on its way."""
        iteration = self.in_flight.pop(number, None)
        self.pool.disown(self._left_behind.pop(number, []))
        self._is_settling = self._is_settling and bool(self.in_flight)
        if iteration is not None:
            for row in iteration.rows:
                row.member.is_alone = row.member.is_alone and row.member.num_left > 0
        return iteration

    def failed(self, number: int) -> list[Member]:
        """An iteration failed. Those whom it names begin again, each alone; one that was alone is returned instead.

        So does whoever shares a block that it should have written; and no block is taken for what it should hold.
        Nothing is planned before the others on their way have ended: they may have been computed on its ground.
        """
        iteration = self.end(number)
        if iteration is None:
            return []
        self._is_settling = bool(self.in_flight)
        self.pool.forget_all()
        members = [row.member for row in iteration.rows if row.is_current]
        written = {block for row in iteration.rows for block in row.blocks[row.start // BLOCK_TOKENS :]}
        for member in [member for member in self.running if member not in members]:
            if not written.isdisjoint(member.blocks):
                self.begin_again(member)
        if len(iteration.rows) == 1:
            return members
        for member in members:
            self.begin_again(member)
            member.is_alone = True
        return []

    # ---- how
    @property
    def _has_room(self) -> bool:
        return not self._is_settling and len(self.in_flight) < (
            1 if self.rule == "paper" else self.max_in_flight
        )

    def _next_rows(self) -> list[PlannedRow]:
        suspects = [
            member for member in (*self.running, *self.waiting) if member.is_alone and member.is_ready
        ]
        if suspects:
            return self._row_alone(suspects[0]) if not self.in_flight else []
        return next(filter(None, map(self._rows, self._versions())), [])

    def _rows(self, version: str) -> list[PlannedRow]:
        ready = [member for member in self.running if member.is_ready and member.version == version]
        decodes = sorted((member for member in ready if member.is_decode), key=lambda member: member.ready_at)
        rows = [
            self._row(member, 1)
            for member in decodes[: self._group_size(version)]
            if member in self.running and self._grow(member)  # another one's growth may have taken its blocks
        ]
        budget = self._prompt_budget(len(rows), has_decodes=any(map(_decodes, self.running)))
        for member in ready:
            if budget > 0 and member in self.running and member.is_ready and not member.is_decode:
                rows.append(self._row(member, budget))
                budget -= rows[-1].length
        while budget > 0 and self.waiting and self._may_join(self.waiting[0], version):
            rows.append(self._row(self._admit(self.waiting[0]), budget))
            budget -= rows[-1].length
        return rows

    def _row_alone(self, member: Member) -> list[PlannedRow]:
        """All that is left of one request, if there is room for it."""
        if member in self.running:
            return [self._row(member, self.max_tokens)] if self._grow(member) else []
        return [self._row(self._admit(member), self.max_tokens)] if self._take_blocks(member, spare=0) else []

    def _admit(self, member: Member) -> Member:
        """It has its blocks."""
        self.waiting.remove(member)
        self.running.append(member)
        return member

    def _versions(self) -> list[str]:
        """The weights that somebody could be computed on, whoever has been ready for longest first."""
        ready = [member for member in self.running if member.is_ready] + self.waiting[:1]
        ready.sort(key=lambda member: member.ready_at)
        return list(dict.fromkeys(member.version for member in ready))

    def _group_size(self, version: str) -> int:
        """How many of a version's that decode are in one iteration: as many in each that can be on its way.

        While requests of two versions run, each version has its part of these: smaller groups would go round longer.
        """
        if self.rule == "paper":
            return WITHOUT_LIMIT
        versions = [member.version for member in self.running if _decodes(member)]
        groups = max(1, self.max_in_flight // max(1, len(set(versions))))
        return -(-versions.count(version) // groups)

    def _prompt_budget(self, num_decodes: int, *, has_decodes: bool) -> int:
        if self.rule == "paper":
            return WITHOUT_LIMIT
        if not has_decodes:
            return self.max_tokens
        return max(min(self.chunk(), self.max_tokens - num_decodes), LEAST_CHUNK)

    def _may_join(self, member: Member, version: str) -> bool:
        if self.rule == "paper" and len(self.running) >= self.max_batch:
            return False
        spare = len(self.running)  # a block for each to grow, or they'd soon have to give theirs up
        return member.version == version and not member.is_alone and self._take_blocks(member, spare=spare)

    def _row(self, member: Member, at_most: int) -> PlannedRow:
        """The member's next tokens, on their way from now on."""
        start, length = member.num_planned, min(member.num_left, at_most)
        member.num_planned = end = start + length
        member.last_iteration = self._next_number
        is_last = end == len(member.ids)
        wants = Wants.NOTHING
        if member.scores_from is not None:
            wants = Wants.SCORES if end > member.scores_from else Wants.NOTHING
        elif is_last:
            wants, member.is_awaited = Wants.TOKEN, True
        for index in range(start // BLOCK_TOKENS, end // BLOCK_TOKENS):
            self.pool.remember(member.blocks[index], member.hash_upto(index + 1))
        return PlannedRow(
            member=member,
            run=member.run,
            start=start,
            length=length,
            wants=wants,
            blocks=tuple(member.blocks[: num_blocks_for(end)]),
            ready_at=member.ready_at,
        )

    # ---- memory
    def _take_blocks(self, member: Member, *, spare: int) -> bool:
        """Blocks for all that is known of a request and its next token; those known already are taken over.

        So many others have to stay free.
        """
        known = self._known_blocks(member)
        self.pool.own(known)
        wanted = num_blocks_for(len(member.ids) + (member.scores_from is None)) - len(known)
        fresh = None
        if wanted + spare <= self.pool.num_free:
            fresh = self.pool.allocate(wanted, behind=known[-1] if known else None)
        if fresh is None:
            self.pool.disown(known)
            return False
        member.blocks, member.num_planned = known + fresh, len(known) * BLOCK_TOKENS
        return True

    def _known_blocks(self, member: Member) -> list[int]:
        """Those of its beginning; something is left to be computed, and all positions that are asked for."""
        if member.is_alone:
            return []
        last = (
            len(member.ids) - 1
            if member.scores_from is None
            else min(member.scores_from, len(member.ids) - 1)
        )
        return self.pool.find(member.hash_upto(index + 1) for index in range(last // BLOCK_TOKENS))

    def _grow(self, member: Member) -> bool:
        """A block for the member's next token, if it has none; somebody may have to give up theirs."""
        while num_blocks_for(member.num_planned + 1) > len(member.blocks):
            fresh = self.pool.allocate(1, behind=member.blocks[-1])
            if fresh is not None:
                member.blocks += fresh
                continue
            victim = max((other for other in self.running if not self._is_named(other)), default=None)
            if victim is None:
                return False
            self.num_preempted += 1
            self.begin_again(victim)
            if victim is member:
                return False
        return True

    def _is_named(self, member: Member) -> bool:
        """By an iteration that is on its way, or is being planned."""
        return member.last_iteration in self.in_flight or member.last_iteration == self._next_number

    def _give_up(self, member: Member) -> None:
        if member.last_iteration in self.in_flight:
            self._left_behind.setdefault(member.last_iteration, []).extend(member.blocks)
        else:
            self.pool.disown(member.blocks)


def _decodes(member: Member) -> bool:
    """Its prompt is computed, and tokens are asked for: it is, or will be, in every round."""
    return member.is_awaited or member.is_decode
