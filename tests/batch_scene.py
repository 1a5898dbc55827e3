"""Requests of all kinds that share the iterations of a running cluster, drawn from a seed, and what came of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from lemix import Future, GenerateItem, ScoreItem
from lemix.replies import TokensGenerated, read_replies
from lemix_common.clock import wait_until
from lemix_common.errors import ItemCancelled
from lemix_common.ids import ItemId
from lemix_common.sampling import GREEDY, Sampling
from lemix_common.store.versions import Versions
from lemix_stage_worker.batching import Batcher, Iteration, Member
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.paged_attention import key_value_shape
from lemix_stage_worker.model.source import open_model
from references import Tally, score_whole
from switch_scene import SOON_S, Switching

NUM_TEXTS, TEXT_TOKENS = 3, 64
"""Beginnings that prompts share."""
TAIL_TOKENS, LONGEST_ANSWER = 16, 48
"""With a shared beginning, as many as the context of the generated models."""
ENDS_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A cluster and what is asked of it."""

    seed: int
    requests: int = 16
    stages: int = 2
    contexts: float = 0.0
    """How many whole contexts fit into a stage's cache; 0: as many as may run."""
    max_running: int = 16
    max_block_ms: float = 20.0
    max_batch_tokens: int = 64
    batching: str = "iteration"
    grows: bool = False
    """Prompts are short and answers long, so that what joins has to be pre-empted where memory is scarce."""
    switches: int = 0
    """Versions that are published while requests run."""

    def __str__(self) -> str:
        return f"seed {self.seed}"

    def settings(self, folder: Path) -> dict[str, Any]:
        """Of its cluster."""
        names = ("stages", "max_running", "max_block_ms", "max_batch_tokens", "batching")
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        chosen["max_queue"] = 1000
        if self.contexts:
            chosen["kv_bytes"] = kv_bytes(folder, self.stages, self.contexts)
        return chosen


def drawn(seed: int, *, max_stages: int = 5, requests: int = 64) -> Plan:
    """Any of them."""
    draw = random.Random(seed)
    return Plan(
        seed=seed,
        requests=requests,
        stages=draw.randint(1, max_stages),
        contexts=draw.choice([0.0, 1.0, 1.3, 2.0, 4.0]),
        max_running=draw.choice([2, 8, 16, 64]),
        max_block_ms=draw.choice([1.0, 20.0, 1000.0]),
        max_batch_tokens=draw.choice([16, 64, 256]),
        batching=draw.choice(["iteration", "iteration", "iteration", "paper"]),
        grows=draw.random() < 0.3,
        switches=draw.choice([0, 1, 2]),
    )


def kv_bytes(folder: Path, stages: int, contexts: float) -> int:
    """What so many contexts take on the stage with the most layers."""
    source = open_model(folder)
    heads, size = key_value_shape(source.config)
    num_layers = max(map(len, cut_model(source, stages)))
    blocks = int(contexts * num_blocks_for(source.context_length))
    return blocks * 2 * num_layers * heads * size * source.dtype.itemsize * BLOCK_TOKENS


@dataclass
class Watch:
    """What the batcher did, looked at while it did it."""

    iterations: list[Iteration] = field(default_factory=list)
    most_in_flight: int = 0
    ends_until_free: list[int] = field(default_factory=list)
    """Of those that left with an iteration on its way: iterations that ended until their blocks weren't owned."""
    num_preempted: int = 0
    _left: list[tuple[Batcher, int, int]] = field(default_factory=list)
    """(whose, the iteration that its blocks wait for, how many had ended then)."""
    _num_ended: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Look on."""
        plan, drop, end = Batcher.plan, Batcher.drop, Batcher.end

        def watched_plan(batcher: Batcher) -> Iteration | None:
            iteration = plan(batcher)
            if iteration is not None:
                self.iterations.append(iteration)
            self.most_in_flight = max(self.most_in_flight, len(batcher.in_flight))
            self.num_preempted = max(self.num_preempted, batcher.num_preempted)
            return iteration

        def watched_drop(batcher: Batcher, member: Member) -> None:
            had_blocks = bool(member.blocks)
            drop(batcher, member)
            if had_blocks and member.last_iteration in batcher.in_flight:
                self._left.append((batcher, member.last_iteration, self._num_ended))

        def watched_end(batcher: Batcher, number: int) -> Iteration | None:
            iteration = end(batcher, number)
            self._num_ended += 1
            for left in [left for left in self._left if left[0] is batcher]:
                if left[1] not in batcher._left_behind:
                    self._left.remove(left)
                    self.ends_until_free.append(self._num_ended - left[2])
            return iteration

        patch.setattr(Batcher, "plan", watched_plan)
        patch.setattr(Batcher, "drop", watched_drop)
        patch.setattr(Batcher, "end", watched_end)

    @property
    def widest(self) -> int:
        """The most rows of an iteration."""
        return max(len(iteration.rows) for iteration in self.iterations)

    @property
    def num_hybrid(self) -> int:
        """Iterations with both a next token of somebody and a part of somebody's prompt."""
        return sum(
            {row.start >= 0 and row.length == 1 and row.start > 0 for row in iteration.rows} == {True, False}
            for iteration in self.iterations
        )

    @property
    def num_chunked(self) -> int:
        """Rows that end before what is known of their request does."""
        return sum(not row.wants and row.length > 1 for it in self.iterations for row in it.rows)

    @property
    def num_reused(self) -> int:
        """Requests whose first row began behind blocks that were known."""
        first = {(id(row.member), row.run): row.start for it in reversed(self.iterations) for row in it.rows}
        return sum(start > 0 for start in first.values())

    def __str__(self) -> str:
        return (
            f"{len(self.iterations)} iterations of up to {self.widest} rows, {self.num_hybrid} hybrid, up to "
            f"{self.most_in_flight} on their way; {self.num_chunked} chunks, {self.num_reused} beginnings reused, "
            f"{self.num_preempted} pre-empted"
        )


@dataclass
class Mixture:
    """The requests of a plan, submitted to a scene."""

    scene: Switching
    plan: Plan
    items: dict[ItemId, GenerateItem | ScoreItem] = field(default_factory=dict)
    futures: dict[ItemId, Future[Any]] = field(default_factory=dict)
    cancelled: set[ItemId] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)

    def run(self) -> None:
        """Submit in random order and at random times, take some back, publish meanwhile; to the end of all."""
        draw = random.Random(self.plan.seed)
        items = list(self._requests(draw))
        draw.shuffle(items)
        publish_at = {
            (part + 1) * len(items) // (self.plan.switches + 1) for part in range(self.plan.switches)
        }
        for number, item in enumerate(items):
            future: Future[Any] = self.scene.client.submit(item)
            self.items[future.item_id], self.futures[future.item_id] = item, future
            if draw.random() < 0.05:  # from here on, others join those that are there already
                wait([draw.choice(list(self.futures.values()))], SOON_S)
            if draw.random() < 0.15:
                self._cancel(draw.choice(list(self.futures)))
            if number in publish_at:
                self._publish(f"switch-{number}")
        wait_until(
            lambda: all(future.done() for future in self.futures.values()),
            what="every request has ended",
            timeout_s=ENDS_S,
        )

    def _requests(self, draw: random.Random) -> Iterator[GenerateItem | ScoreItem]:
        vocab_size = next(iter(self.scene.models.values())).config.vocab_size

        def ids(count: int) -> list[int]:
            return [draw.randrange(3, vocab_size) for _ in range(count)]

        texts = [ids(TEXT_TOKENS) for _ in range(NUM_TEXTS)]
        for index in range(self.plan.requests):
            begins = [[], *(text[: draw.choice([16, 40, 64])] for text in texts)]
            prompt = draw.choice(begins[: 1 if self.plan.grows else None]) + ids(draw.randint(1, TAIL_TOKENS))
            priority = draw.choice([0, 0, 0, 5, -5])
            if draw.random() < 0.15:
                yield ScoreItem(prompt, ids(draw.randint(1, 30)), priority=priority)
                continue
            yield GenerateItem(
                prompt,
                LONGEST_ANSWER if self.plan.grows else draw.randint(1, draw.choice([4, 16, LONGEST_ANSWER])),
                sampling=draw.choice(
                    [
                        GREEDY,
                        Sampling(repetition_penalty=1.3),
                        Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=index),
                        Sampling(temperature=1.1, min_p=0.02, repetition_penalty=1.2, seed=index),
                    ]
                ),
                ignore_eos=draw.random() < 0.8,
                on_update=draw.choice(["finish", "rebuild"]),
                priority=priority,
            )

    def _cancel(self, item: ItemId) -> None:
        if self.scene.client.cancel(item):
            self.cancelled.add(item)

    def _publish(self, name: str) -> None:
        """And know the version's weights, which stay on disk while requests that are on it run."""
        before = Versions(self.scene.broker).live()["served"]
        version = self.scene.publish(name)
        assert version != before

    def check(self) -> None:
        """What each client was sent is what the whole model says, version by version; nothing is left of them."""
        sent = self._sent()
        for name, item in self.items.items():
            if isinstance(item, ScoreItem):
                self._check_score(name, item)
            else:
                self._check_tokens(name, item, sent.get(name, []))
        self.tally.check()
        wait_until(
            self.scene.cluster.has_forgotten_items, what="no block, place or iteration is left", timeout_s=10
        )

    def _check_score(self, name: ItemId, item: ScoreItem) -> None:
        if name in self.cancelled:
            with pytest.raises(ItemCancelled):
                self.futures[name].result(0)
            return
        answer = self.futures[name].result(0)
        whole = self.scene.models[answer.weights_version]
        assert not isinstance(item.prompt, str)
        assert not isinstance(item.reference, str)
        expected = score_whole(whole, list(item.prompt), list(item.reference))
        assert answer.logprobs == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def _check_tokens(self, name: ItemId, item: GenerateItem, sent: list[tuple[int, str]]) -> None:
        tokens = [token for token, _ in sent]
        if name in self.cancelled:
            with pytest.raises(ItemCancelled):
                self.futures[name].result(0)
            assert len(tokens) <= item.max_new_tokens
        else:
            answer = self.futures[name].result(0)
            assert list(answer.tokens) == tokens
            is_full = len(tokens) == item.max_new_tokens
            assert is_full if item.ignore_eos else is_full or answer.finish_reason == "stop"
        assert not isinstance(item.prompt, str)
        before = list(item.prompt)
        for version, part in groupby(sent, key=lambda pair: pair[1]):
            span = [token for token, _ in part]
            self.tally.compare(self.scene.models[version], before, span, item.sampling)
            before += span

    def _sent(self) -> Mapping[ItemId, list[tuple[int, str]]]:
        """The tokens that each request's client was sent, in order, each once, with its version."""
        entries: Any = self.scene.broker.client.xrange(self.scene.broker.keys.replies(self.scene.client.name))
        sent: dict[ItemId, list[tuple[int, str]]] = {}
        for _, fields in entries:
            for reply in read_replies(fields) if "event" in fields else ():
                if isinstance(reply, TokensGenerated):
                    known = sent.setdefault(reply.item, [])
                    assert reply.index == len(known)
                    known += [(token, reply.weights_version) for token in reply.tokens]
        return sent
