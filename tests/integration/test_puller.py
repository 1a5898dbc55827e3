"""The puller of a node's stage 0: who is started when, and what has happened to those that wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from integration.scripted_worker import BYTES_TOKENIZER, MODEL
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster
from lemix_common.store.items import STAGE_0, Items, StartedItem
from lemix_stage_worker.inbox import Inbox, ItemsStarted
from lemix_stage_worker.puller import Puller

SOON_S = 10.0
CONSUMER = "w:1"
"""The puller's, as the broker knows it."""


@dataclass
class Scene:
    """A node whose items are pulled; nobody computes them."""

    broker: Broker
    leader: int
    puller: Puller
    inbox: Inbox = field(default_factory=Inbox)
    started: list[StartedItem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = Items(self.broker)

    def give(self, item: str, **fields: object) -> None:
        """Submit an item and dispatch it to the node."""
        about = {"kind": "generate", "tokens": 3, "client": "me"} | fields
        self.items.submit(item, about, {"prompt": [1, 2]})
        if "accepted_at" in fields:
            self.broker.client.hset(self.broker.keys.item(item), "accepted_at", str(fields["accepted_at"]))
        (entry,) = self.items.submitted("coordinator", count=1, pending=False)
        assert self.broker.call_many([self.items.dispatch(self.leader, entry, 0)]) == [["ok"]]

    def next_started(self) -> str:
        """The item that is started next."""
        wait_until(self._has_started, what="an item is started", timeout_s=SOON_S)
        return self.started[-1].item

    def _has_started(self) -> bool:
        for arrival in self.inbox.drain(wait_s=0.05):
            assert isinstance(arrival, ItemsStarted)
            self.started += arrival.items
            return True
        return False

    def end(self) -> None:
        """The item started last is done."""
        started = self.started[-1]
        self.broker.call_many([self.items.complete(started, 0, {"tokens": []})])
        self.puller.ended(started.entry)

    def state(self, item: str) -> dict[str, str]:
        """An item's hash."""
        return self.broker.hash(self.broker.keys.item(item))


@pytest.fixture
def scene(broker: Broker) -> Iterator[Scene]:
    """A node on which one item runs at a time."""
    Cluster(broker).create(ClusterSettings(model="m", max_deliveries=1), MODEL, BYTES_TOKENIZER)
    leader = Cluster(broker).lead("me", expiry_s=60)
    assert leader is not None
    inbox = Inbox()
    puller = Puller(Items(broker), inbox, "w", 0, 1, max_running=1)
    yield Scene(broker, leader, puller, inbox)
    puller.stop()
    if puller._thread is not None:
        puller._thread.join(SOON_S)
        assert not puller._thread.is_alive()


def test_the_urgent_go_first_wherever_they_are_in_the_stream(scene: Scene) -> None:
    """Behind more than can run, and though they came last; among equals the first comes first."""
    for item in ("a", "b", "c"):
        scene.give(item)
    scene.give("urgent", priority=5)
    scene.give("whenever", priority=-5)
    scene.puller.start()
    assert scene.next_started() == "urgent"
    scene.end()
    assert scene.next_started() == "a"
    scene.give("now", priority=10)
    scene.end()
    assert scene.next_started() == "now"
    for item in ("b", "c", "whenever"):
        scene.end()
        assert scene.next_started() == item


def test_who_waited_long_goes_before_the_urgent(scene: Scene) -> None:
    """A step of priority is worth some seconds, so a flood of urgent items starves nobody."""
    scene.give("urgent", priority=10, accepted_at=1200.0)
    scene.give("old", priority=-10, accepted_at=1000.0)
    scene.puller.start()
    assert scene.next_started() == "old"


def test_nothing_has_happened_to_what_waits(scene: Scene) -> None:
    """No version is pinned for it and no delivery counted, so a node may be lost as often as it likes."""
    scene.give("a")
    scene.give("b")
    scene.puller.start()
    assert scene.next_started() == "a"
    pending = scene.broker.client.xpending_range(
        scene.broker.keys.work(0), STAGE_0, "-", "+", 10, consumername=CONSUMER
    )
    assert len(pending) == 2  # it was given b too
    waiting = scene.state("b")
    assert waiting["state"] == "dispatched"
    assert not {"deliveries", "weights_version", "started_at"} & waiting.keys()
    assert scene.broker.hash(scene.broker.keys.versions_in_flight) == {"0.0": "1"}
    for _ in range(3):
        (entry,) = (entry for entry in scene.items.work_of(0) if entry.fields["item"] == "b")
        redispatch = scene.items.redispatch(scene.leader, 0, entry, target=0, reason="its stages were lost")
        assert scene.broker.call_many([redispatch]) == [["ok"]]
    scene.end()
    assert scene.next_started() == "b"
    assert (scene.started[-1].attempt, scene.state("b")["deliveries"]) == (4, "1")


def test_what_was_taken_back_while_it_waited_is_cleared_away(scene: Scene) -> None:
    """It is never started, and its entry is gone when its turn has come."""
    for item in ("a", "b", "c"):
        scene.give(item)
    scene.puller.start()
    assert scene.next_started() == "a"
    assert scene.items.cancel("b")
    scene.end()
    assert scene.next_started() == "c"
    assert [entry.fields["item"] for entry in scene.items.work_of(0)] == ["c"]
    assert not scene.puller._line


def test_a_lost_answer_strands_nothing(scene: Scene) -> None:
    """What the broker gave this consumer in an answer that never came is read again, and nothing twice."""
    scene.give("a")
    scene.give("b")
    stream = scene.broker.keys.work(0)
    assert scene.broker.client.xreadgroup(STAGE_0, CONSUMER, {stream: ">"})
    scene.puller.start()
    scene.broker.outages += 1
    assert scene.next_started() == "a"
    scene.broker.outages += 1
    scene.end()
    assert scene.next_started() == "b"
    assert [started.item for started in scene.started] == ["a", "b"]
