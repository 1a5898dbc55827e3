"""Iterations of many requests: each token's keys are those of its own sequence, whatever happens around it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import methodcaller

from hypothesis import given, settings
from hypothesis import strategies as st

from lemix_stage_worker.batching import Batcher, BatchingRule, Iteration, Member, Wants
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, BlockPool, num_blocks_for

CONTEXT = 6 * BLOCK_TOKENS
Content = tuple[str, tuple[int, ...]]
"""Weights and sequence up to a token: what its keys are made of."""


@dataclass(eq=False)
class Item:
    """What a test asks for."""

    member: Member
    prompt: int
    new_tokens: int

    @property
    def is_over(self) -> bool:
        """All its tokens are there; a score's prompt and reference are computed."""
        if self.member.scores_from is not None:
            return self.member.num_planned == len(self.member.ids) and not self.member.is_awaited
        return len(self.member.ids) - self.prompt >= self.new_tokens


@dataclass
class Node:
    """Stages that take iterations in order; their cache holds for each slot what it was computed from."""

    batcher: Batcher
    slots: dict[int, Content] = field(default_factory=dict)
    under_way: deque[Iteration] = field(default_factory=deque)
    items: list[Item] = field(default_factory=list)
    time: float = 0.0
    num_members: int = 0
    scored: dict[int, list[int]] = field(default_factory=dict)

    def submit(
        self,
        ids: list[int],
        new_tokens: int,
        *,
        version: str = "0.1",
        turn: float = 0.0,
        scores_from: int | None = None,
    ) -> Item:
        """A request arrives."""
        self.time += 1
        member = Member(
            number=self.num_members,
            version=version,
            ids=list(ids),
            turn=turn,
            ready_at=self.time,
            scores_from=scores_from,
        )
        self.num_members += 1
        self.items.append(Item(member, len(ids), new_tokens))
        self.batcher.add(member)
        return self.items[-1]

    def begin(self) -> bool:
        """Stage 0 begins the next iteration."""
        iteration = self.batcher.plan()
        if iteration is None:
            return False
        self.check_plan(iteration)
        self.under_way.append(iteration)
        self.write(iteration)
        return True

    def check_plan(self, iteration: Iteration) -> None:
        """It is within its limits, of one version, and no slot is written by two."""
        assert len(self.batcher.in_flight) <= self.batcher.max_in_flight
        assert len({id(row.member) for row in iteration.rows}) == len(iteration.rows)
        assert {row.member.version for row in iteration.rows} == {iteration.version}
        written = [
            row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            for row in iteration.rows
            for position in range(row.start, row.start + row.length)
        ]
        assert len(set(written)) == len(written)

    def write(self, iteration: Iteration) -> None:
        """What every layer does: all keys are written, then each row reads those of its sequence."""
        for row in iteration.rows:
            for position in range(row.start, row.start + row.length):
                slot = row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                self.slots[slot] = (iteration.version, tuple(row.member.ids[: position + 1]))
        for row in iteration.rows:
            for position in range(row.start + row.length):
                slot = row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                assert self.slots[slot] == (iteration.version, tuple(row.member.ids[: position + 1]))

    def finish(self) -> None:
        """The oldest iteration comes back."""
        if not self.under_way:
            return
        self.time += 1
        iteration = self.under_way.popleft()
        assert self.batcher.end(iteration.number) is iteration
        for row in iteration.rows:
            if not row.is_current:
                continue
            if row.wants is Wants.TOKEN:
                self.batcher.give_token(row.member, 7 + len(row.member.ids) % 3, self.time)
            if row.wants is Wants.SCORES:
                self.scored.setdefault(row.member.number, []).extend(range(row.start, row.start + row.length))
        self.leave()

    def fail(self) -> None:
        """The oldest iteration fails; a later stage never wrote what it should have."""
        if not self.under_way:
            return
        iteration = self.under_way.popleft()
        for row in iteration.rows:
            for position in range(row.start, row.start + row.length):
                slot = row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                if self.slots.get(slot) == (iteration.version, tuple(row.member.ids[: position + 1])):
                    del self.slots[slot]
        for member in self.batcher.failed(iteration.number):
            self.batcher.begin_again(member)  # a test's requests are no poison: they'd fail else

    def cancel(self, index: int) -> None:
        """A client takes a request back."""
        if self.items:
            item = self.items.pop(index % len(self.items))
            self.batcher.drop(item.member)

    def move(self, index: int) -> None:
        """A request goes on upon other weights."""
        if self.items:
            self.batcher.begin_again(self.items[index % len(self.items)].member, version="0.2")

    def leave(self) -> None:
        """What is over leaves."""
        for item in [item for item in self.items if item.is_over]:
            if not any(row.member is item.member for iteration in self.under_way for row in iteration.rows):
                self.items.remove(item)
                self.batcher.drop(item.member)

    def run_out(self) -> None:
        """To the end of all requests, which comes."""
        for _ in range(20_000):
            while self.begin():
                pass
            if not self.under_way:
                break
            self.finish()
        self.leave()
        assert not self.items, "somebody starves"


def node(
    *,
    blocks: int = 64,
    in_flight: int = 2,
    chunk: int = 24,
    rule: BatchingRule = "iteration",
    max_batch: int = 4,
) -> Node:
    """A node with so many blocks."""
    batcher = Batcher(
        BlockPool(blocks),
        max_in_flight=1 if rule == "paper" else in_flight,
        chunk=lambda: chunk,
        max_tokens=48,
        rule=rule,
        max_batch=max_batch,
    )
    return Node(batcher)


Step = Callable[[Node], object]


def submits(length: int, new_tokens: int, text: int) -> Step:
    """A request that begins like one of three texts."""
    ids = [text * 100 + position for position in range(length)]
    return lambda node: node.submit(ids, min(new_tokens, CONTEXT - length))


def scores(length: int, reference: int, text: int) -> Step:
    """A prompt and reference to score."""
    ids = [text * 100 + position for position in range(length)] + [1] * min(reference, CONTEXT - length)
    return lambda node: node.submit(ids, 0, scores_from=length - 1)


Lengths, NewTokens, Texts = st.sampled_from([1, 5, 16, 17, 40, 64]), st.integers(1, 20), st.integers(0, 2)
Steps = st.lists(
    st.one_of(
        st.builds(submits, Lengths, NewTokens, Texts),
        st.builds(scores, Lengths, NewTokens, Texts),
        st.sampled_from([Node.begin, Node.begin, Node.finish, Node.fail]),
        st.builds(methodcaller, st.sampled_from(["cancel", "move"]), st.integers(0, 63)),
    ),
    max_size=60,
)


@given(
    steps=Steps,
    blocks=st.sampled_from([6, 9, 20, 64]),
    in_flight=st.integers(1, 5),
    chunk=st.sampled_from([1, 16, 40]),
    rule=st.sampled_from(["iteration", "paper"]),
)
@settings(max_examples=300, deadline=None)
def test_every_key_is_its_own_sequences_and_every_block_comes_back(
    steps: list[Step], blocks: int, in_flight: int, chunk: int, rule: BatchingRule
) -> None:
    """Whoever joins, leaves, fails, moves or is pre-empted: what is read is right, all end, no block stays owned."""
    subject = node(blocks=blocks, in_flight=in_flight, chunk=chunk, rule=rule)
    for step in steps:
        step(subject)
    subject.run_out()
    assert subject.batcher.pool.num_owned == 0
    assert not subject.batcher.in_flight
    for number, positions in subject.scored.items():
        assert sorted(set(positions)) == list(range(positions[0], positions[-1] + 1)), number


def test_requests_that_decode_go_round_in_as_many_groups_as_there_are_workers() -> None:
    """Eight requests on two workers: iterations of four, two on their way."""
    subject = node(in_flight=2, chunk=64)
    for _ in range(8):
        subject.submit([5], 12)
    sizes = []
    for _ in range(40):
        while subject.begin():
            sizes.append(len(subject.under_way[-1].rows))
        subject.finish()
    assert sizes[6:20] == [4] * 14


def test_two_versions_share_the_workers() -> None:
    """While requests of both decode each version has one iteration on its way, with all of its requests."""
    subject = node(in_flight=2, chunk=64)
    for number in range(8):
        subject.submit([5], 20, version="0.1" if number < 6 else "0.2")
    sizes = []
    for _ in range(40):
        while subject.begin():
            sizes.append((subject.under_way[-1].version, len(subject.under_way[-1].rows)))
        subject.finish()
    assert set(sizes[10:30]) == {("0.1", 6), ("0.2", 2)}


def test_a_prompt_is_computed_in_chunks_beside_those_who_decode() -> None:
    """Decodes go first; beside them there is a chunk of the size that they may be asked to wait for."""
    subject = node(in_flight=1, chunk=24)
    subject.submit([5], 12)
    subject.begin()
    subject.finish()
    subject.submit(list(range(64)), 1)
    chunks = []
    while subject.items and subject.begin():
        rows = subject.under_way[-1].rows
        chunks.append([row.length for row in rows])
        subject.finish()
    assert chunks[:3] == [[1, 24], [1, 24], [1, 16]]


def test_a_prompt_gets_further_however_many_decode() -> None:
    """Also where those who decode are as many as an iteration's tokens."""
    subject = node(blocks=200, in_flight=1, chunk=24)
    for number in range(48):
        subject.submit([number], 80)
    for _ in range(3):
        subject.begin()
        subject.finish()
    late = subject.submit(list(range(60)), 1)
    for _ in range(8):
        subject.begin()
        subject.finish()
    assert late not in subject.items


def test_a_prompt_that_begins_like_an_earlier_one_takes_its_blocks() -> None:
    """Only what is new is computed; another version computes everything."""
    subject = node(in_flight=1, chunk=64)
    ids = list(range(40))
    subject.submit(ids, 1)
    subject.run_out()
    for version, expected in (("0.1", 40 - 2 * BLOCK_TOKENS), ("0.2", 40)):
        subject.submit(ids, 1, version=version)
        subject.begin()
        assert [row.length for row in subject.under_way[-1].rows] == [expected]
        subject.run_out()


def test_blocks_of_a_cancelled_request_are_free_when_its_iterations_are_over() -> None:
    """Not before, since they are still written to; and after at most as many as were on their way."""
    subject = node(in_flight=2, chunk=16)
    subject.submit(list(range(64)), 8)
    subject.begin()
    subject.begin()
    subject.cancel(0)
    assert subject.batcher.pool.num_owned == num_blocks_for(65)
    subject.finish()
    subject.finish()
    assert subject.batcher.pool.num_owned == 0


def test_the_last_in_line_is_pre_empted_and_computed_again() -> None:
    """Two requests that grow beyond the memory: the first one isn't disturbed, the other one ends after it."""
    subject = node(blocks=4, in_flight=1, chunk=64)
    first = subject.submit([1] * 16, 40, turn=1)
    second = subject.submit([2] * 15, 40, turn=2)
    ended = []
    while subject.items:
        subject.begin()
        subject.finish()
        ended += [item for item in (first, second) if item not in subject.items and item not in ended]
    assert subject.batcher.num_preempted > 0
    assert ended == [first, second]


@given(
    lengths=st.lists(st.integers(1, 16), min_size=4, max_size=12),
    in_flight=st.integers(2, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_who_gives_way_holds_up_nobody(lengths: list[int], in_flight: int, seed: int) -> None:
    """If nothing is on its way there is something to be computed, also where the first in line gave its blocks up."""
    subject, draw = node(blocks=8, in_flight=in_flight), random.Random(seed)
    for number, length in enumerate(lengths):
        subject.submit([number] * length, 48)
    while subject.items:
        for _ in range(draw.randint(1, in_flight)):
            if not subject.begin():
                break
        assert subject.under_way, "everybody waits for ever"
        for _ in range(draw.randint(1, len(subject.under_way))):
            subject.finish()


def test_the_papers_rule_takes_whole_prompts_one_iteration_at_a_time() -> None:
    """A batch of at most so many, new members' prompts beside the old ones' next tokens."""
    subject = node(rule="paper", max_batch=2)
    for _ in range(3):
        subject.submit(list(range(60)), 2)
    subject.begin()
    assert [row.length for row in subject.under_way[-1].rows] == [60, 60 - 3 * BLOCK_TOKENS]
    assert not subject.begin()
    subject.finish()
    subject.begin()
    assert [row.length for row in subject.under_way[-1].rows] == [1, 1]


def test_an_empty_node_waits_for_a_batch_only_so_long() -> None:
    """The paper's rule: until the batch is full, or the first one has waited its time."""
    batcher = Batcher(BlockPool(8), 1, lambda: 16, 64, rule="paper", max_batch=2, max_wait_s=0.5)
    first = Member(number=0, version="0.1", ids=[1], turn=0, ready_at=3.0)
    batcher.add(first)
    assert batcher.plan_at() == 3.5
    batcher.add(Member(number=1, version="0.1", ids=[1], turn=0, ready_at=3.1))
    assert batcher.plan_at() == 0.0


def test_one_that_fails_beyond_its_first_chunk_fails_with_others_once() -> None:
    """Begun again, it stays alone until its tokens are there, however many iterations that takes."""
    subject = node(in_flight=1, chunk=64)
    others = [subject.submit([5], 12) for _ in range(3)]
    subject.begin()
    subject.finish()
    poison = subject.submit(list(range(90)), 1)  # more than one iteration takes
    failed: list[list[Member]] = []
    while subject.items:
        subject.begin()
        if any(row.member is poison.member and row.wants for row in subject.under_way[0].rows):
            failed.append(subject.batcher.failed(subject.under_way.popleft().number))
            if failed[-1]:
                subject.cancel(subject.items.index(poison))
        else:
            subject.finish()
    assert failed == [[], [poison.member]]
    assert [len(other.member.ids) for other in others] == [13] * 3
