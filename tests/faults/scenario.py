"""A small load of every kind of item, and what must hold when it has ended, whoever died meanwhile."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters import InProcessCluster
from lemix import Client, Future, GenerateItem, ScoreItem, TrainItem
from lemix.replies import ItemEnded, Reply, TokensGenerated, read_replies
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.ids import ItemId
from lemix_common.sampling import Sampling
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.items import STAGE_0, Items
from tiny_model import WORDS, write_tiny_llama

STEPS, STEP_EXAMPLES = 6, 2
NEW_TOKENS = 30
ENDS = ("done", "failed", "cancelled")


def small_settings(folder: Path, **changes: object) -> ClusterSettings:
    """Of a cluster that trains in steps of two examples and checkpoints every second step."""
    settings: dict[str, Any] = {
        "step_examples": STEP_EXAMPLES,
        "checkpoint_every": 2,
        "learning_rate": 1e-2,
        "max_running": 3,
    }
    return ClusterSettings(model=str(folder), **(settings | changes))


def small_model(folder: Path) -> Path:
    """Four layers of a tied Llama."""
    return write_tiny_llama(folder, layers=4)


def examples() -> list[TrainItem]:
    """Those of all steps, in order."""
    draw = random.Random(5)
    return [
        TrainItem(_ids(draw, 12), _ids(draw, 20), item_id=f"example-{index}")
        for index in range(STEPS * STEP_EXAMPLES)
    ]


def _ids(draw: random.Random, most: int) -> list[int]:
    return [draw.randrange(3, len(WORDS)) for _ in range(draw.randint(1, most))]


@dataclass
class Load:
    """Items submitted to a cluster, and their futures."""

    cluster: InProcessCluster
    client: Client
    futures: list[Future[Any]] = field(default_factory=list)

    @property
    def broker(self) -> Broker:
        """The cluster's."""
        return self.cluster.broker

    def serve(self, count: int = 6) -> None:
        """Submit generations, greedy and sampled, and scores."""
        draw = random.Random(11)
        for index in range(count):
            sampling = Sampling(temperature=float(index % 2), seed=index)
            generate = GenerateItem(_ids(draw, 20), NEW_TOKENS, sampling=sampling, ignore_eos=True)
            self.futures.append(self.client.submit(generate))
            self.futures.append(self.client.submit(ScoreItem(_ids(draw, 20), _ids(draw, 20))))

    def train(self) -> None:
        """Submit all steps' examples."""
        self.futures.extend(self.client.submit(example) for example in examples())

    def settle(self, timeout_s: float = 25.0) -> None:
        """Start again whatever has died until every item has ended."""

        def all_ended() -> bool:
            self.cluster.replace_dead()
            return all(future.done() for future in self.futures)

        wait_until(all_ended, what="every item has ended", timeout_s=timeout_s)
        wait_until(self._is_calm, what="every stage is ready and at the committed step", timeout_s=timeout_s)

    def _is_calm(self) -> bool:
        self.cluster.replace_dead()
        return self.cluster.is_ready() and self.cluster.is_trained()

    def check(self) -> None:
        """Every item ended once, as done; no token twice or missing; nothing is left in any queue."""
        news = self._news()
        for future in self.futures:
            ends = [reply for reply in news[future.item_id] if isinstance(reply, ItemEnded)]
            assert [end.state for end in ends] == ["done"], (future.item_id, news[future.item_id])
            answer = future.result(0)
            if hasattr(answer, "tokens"):
                assert streamed(news[future.item_id]) == list(answer.tokens), news[future.item_id]
                assert len(answer.tokens) == NEW_TOKENS
                assert Items(self.broker).tokens(future.item_id) == list(answer.tokens)
        totals = self.broker.hash(self.broker.keys.totals)
        assert (int(totals["submitted"]), int(totals["done"]), int(totals["open"])) == (
            len(self.futures),
            len(self.futures),
            0,
        )
        wait_until(
            lambda: self._leftovers() == [], what=f"nothing is left, {self._leftovers()}", timeout_s=5.0
        )
        self.check_steps()

    def check_steps(self) -> None:
        """Each example is in exactly one committed step, in submission order."""
        keys, trained = self.broker.keys, [f for f in self.futures if f.item_id.startswith("example-")]
        steps = [self.broker.hash(keys.step(MAIN_RUN, step)) for step in range(1, STEPS + 1)]
        assert all("committed_at" in step for step in steps) or not trained
        assert [item for step in steps for item in json.loads(step.get("items", "[]"))] == [
            future.item_id for future in trained
        ]

    def _news(self) -> dict[ItemId, list[Reply]]:
        entries: Any = self.broker.client.xrange(self.broker.keys.replies(self.client.name))
        news: defaultdict[ItemId, list[Reply]] = defaultdict(list)
        for _, fields in entries:
            if "event" in fields:
                for reply in read_replies(fields):
                    news[reply.item].append(reply)
        return news

    def _leftovers(self) -> list[str]:
        keys = self.broker.keys
        client: Any = self.broker.client
        streams = [keys.submissions, keys.examples(MAIN_RUN)]
        streams += [keys.work(node) for node in range(self.cluster.settings.nodes)]
        left = [stream for stream in streams if client.xlen(stream)]
        groups = [(keys.work(node), STAGE_0) for node in range(self.cluster.settings.nodes)]
        left += [f"{stream} pending" for stream, group in groups if client.xpending(stream, group)["pending"]]
        left += [f"in flight {version}" for version in client.hkeys(keys.versions_in_flight)]
        return left + ([] if self.cluster.has_forgotten_items() else ["caches or requests"])


def streamed(news: list[Reply]) -> list[int]:
    """The tokens a client was sent; each position once, in order."""
    tokens: list[int] = []
    for reply in news:
        if isinstance(reply, TokensGenerated):
            assert reply.index == len(tokens), reply
            tokens.extend(reply.tokens)
    return tokens


def notices(broker: Broker, kind: str) -> list[dict[str, str]]:
    """The control stream's notices of a kind, in order."""
    entries: Any = broker.client.xrange(broker.keys.control)
    return [fields for _, fields in entries if fields["type"] == kind]
