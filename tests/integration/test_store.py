"""The store's Lua calls, over memory and a real server: each may be repeated, and late ones change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from integration.scripted_worker import BYTES_TOKENIZER, MODEL, ScriptedWorker
from lemix.replies import read_replies
from lemix_common.broker import Broker, Entry
from lemix_common.clock import ManualClock, wait_until
from lemix_common.errors import (
    BadInput,
    Fenced,
    ItemUnknown,
    QueueFull,
    ShuttingDown,
    TokenizerMismatch,
)
from lemix_common.ids import Version
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import STAGE_0, Call, ChosenTokens, Items, StartedItem
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.training import GradientReport, PlannedStep, Training
from lemix_common.store.updates import Updates
from lemix_common.store.versions import Versions

STAGES = 2
REPORT = GradientReport(losses={}, squares=(1.0,))


def everything(broker: Broker) -> dict[str, object]:
    """All the cluster's keys and values, but the notices and leases, which may be repeated."""
    client: Any = broker.client
    read: dict[str, Callable[[str], object]] = {
        "hash": client.hgetall,
        "set": client.smembers,
        "string": client.get,
        "list": lambda key: client.lrange(key, 0, -1),
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "stream": lambda key: (client.xrange(key), _pending(client, key)),
    }
    keys = set(client.keys(f"{broker.keys.prefix}*")) - {broker.keys.control, broker.keys.leader}
    return {key: read[client.type(key)](key) for key in keys}


def _pending(client: Any, stream: str) -> object:
    return [
        (group["name"], client.xpending_range(stream, group["name"], "-", "+", 100) and group["pending"])
        for group in client.xinfo_groups(stream)
    ]


@dataclass
class Store:
    """A cluster of one node, and calls that are made twice."""

    broker: Broker
    settings: ClusterSettings
    leader: int = 0

    def __post_init__(self) -> None:
        self.cluster, self.items = Cluster(self.broker), Items(self.broker)
        self.training, self.versions = Training(self.broker, MAIN_RUN), Versions(self.broker)

    def twice(self, call: Call | Callable[[], object]) -> Any:
        """Make a call; made again, as after a lost answer, it changes nothing."""
        first = self._make(call)
        before = everything(self.broker)
        self._make(call)
        assert everything(self.broker) == before
        return first

    def unchanged_by(self, call: Call | Callable[[], object]) -> Any:
        """Make a call that comes too late."""
        before = everything(self.broker)
        answer = self._make(call)
        assert everything(self.broker) == before
        return answer

    def _make(self, call: Call | Callable[[], object]) -> Any:
        return call() if callable(call) else self.broker.call_many([call])[0]

    # ---- shorthands
    def bring(self, item: str, state: str, **fields: object) -> StartedItem | None:
        """Submit an item and bring it that far."""
        self.submit(item, "generate", **fields)
        if state != "queued":
            self.broker.call_many([self.items.dispatch(self.leader, self.submission(), 0)])
        return self.pull() if state == "running" else None

    def told(self, notice: str) -> list[str]:
        """The items that nodes were told of by notices of a kind."""
        entries: Any = self.broker.client.xrange(self.broker.keys.control)
        return [fields["item"] for _, fields in entries if fields["type"] == notice]

    def clear_away(self) -> None:
        """What coordinator and nodes do with entries of items that have ended; no stream keeps any."""
        self.broker.call_many(
            [
                self.items.dispatch(self.leader, entry, 0)
                for entry in self.items.submitted("coordinator", count=9, pending=False)
            ]
        )
        self.broker.call_many([self.items.close_entry(0, entry.id) for entry in self.items.work_of(0)])
        keys = self.broker.keys
        assert not self.broker.client.xlen(keys.submissions) + self.broker.client.xlen(keys.work(0))
        assert not self.broker.client.exists(keys.deadlines, keys.clients, *self._keys_of_client())

    def _keys_of_client(self) -> tuple[str, str]:
        return self.broker.keys.client_items("me"), self.broker.keys.client_alive("me")

    def submit(self, item: str, kind: str = "generate", **fields: object) -> str:
        """Submit an item of three tokens."""
        about = {"kind": kind, "tokens": 3, "reference_tokens": 1, "client": "me", "run": MAIN_RUN}
        return self.items.submit(item, about | fields, {"prompt": [1, 2], "reference": [3]})

    def item(self, name: str) -> dict[str, str]:
        """An item's hash."""
        return self.broker.hash(self.broker.keys.item(name))

    def submission(self) -> Entry:
        """The next submission."""
        (entry,) = self.items.submitted("coordinator", count=1, pending=False)
        return entry

    def start(self, item: str, node: int = 0) -> StartedItem:
        """Submit, dispatch, pull and start an item."""
        self.submit(item)
        self.broker.call_many([self.items.dispatch(self.leader, self.submission(), node)])
        return self.pull(node)

    def append(self, item: str, attempt: int, position: int, tokens: list[int]) -> Call:
        """The call that gives a client tokens of one item."""
        return self.items.append_tokens([ChosenTokens(item, attempt, position, tuple(tokens))])

    def pull(self, node: int = 0) -> StartedItem:
        """Pull and start the next item of a node."""
        stream = self.broker.keys.work(node)
        entries = self.broker.read_group(stream, STAGE_0, "w", block_s=0.001, count=1)
        ((started,), _) = self.items.start(node, "w", entries)
        return started

    def begin_again(self, item: str) -> StartedItem:
        """Send a running item on from a lost stage, to the same node."""
        (entry,) = (entry for entry in self.items.work_of(0) if entry.fields["item"] == item)
        redispatch = self.items.redispatch(self.leader, 0, entry, target=0, reason="lost")
        assert self.broker.call_many([redispatch]) == [["ok"]]
        return self.pull()

    def news(self) -> list[str]:
        """What the client was told, in order."""
        entries: Any = self.broker.client.xrange(self.broker.keys.replies("me"))
        replies = [reply for _, fields in entries for reply in read_replies(fields)]
        return [f"{reply.item} {getattr(reply, 'state', 'token')}" for reply in replies]

    def totals(self) -> dict[str, str]:
        """The counters of items."""
        counted = self.broker.hash(self.broker.keys.totals)
        names = ("submitted", "done", "failed", "cancelled", "refused", "open")
        return {name: counted[name] for name in names if counted.get(name, "0") != "0"}

    def place(self) -> int:
        """Place and report the node's stages; returns its epoch."""
        self.cluster.place(self.leader, 0, [f"w{stage}" for stage in range(STAGES)])
        epoch = int(self.cluster.nodes(1)[0]["epoch"])
        for stage in range(STAGES):
            self.ready(stage, epoch)
        return epoch

    def ready(
        self, stage: int, epoch: int, versions: tuple[str, ...] = ("0.0",)
    ) -> tuple[list[str], list[str]]:
        """A stage's report."""
        run = self.training.state()
        return self.cluster.stage_ready(
            f"w{stage}",
            node=0,
            stage=stage,
            epoch=epoch,
            training=Version(run.lineage, run.committed),
            versions=versions,
            layers=[stage, stage],
            memory_bytes=1,
        )

    def plan(self, step: int, *items: str) -> str:
        """Plan a step of these examples, which are the oldest."""
        entries = self.training.queued_examples(len(items))
        planned = PlannedStep(
            run=MAIN_RUN,
            step=step,
            items=items,
            cuts=(1,) * len(items),
            shards=tuple(range(len(items))),
            reference_tokens=len(items),
            learning_rate=0.1,
            weight_decay=0.0,
            seed=0,
        )
        return self.training.plan(self.leader, planned, cursor=entries[-1].id if entries else "0-0")

    def begin(self, step: int, epoch: int) -> int:
        """Begin an attempt on the only node; returns its number."""
        seen = self.training.state()
        self.training.start_step(
            self.leader,
            step,
            weights=step - 1,
            members=[0],
            epochs=[epoch],
            shard_nodes=[0] * 4,
            seen=seen,
        )
        return self.training.state().attempt

    def gradients(self, step: int, attempt: int, stage: int) -> Call:
        """A stage's report; the last stage's has the losses."""
        losses = {0: 0.5, 1: 0.25} if stage == STAGES - 1 else {}
        report = GradientReport(losses=losses, squares=(4.0,))
        return self.training.gradients_ready(step, attempt, node=0, stage=stage, report=report)

    def commit(self, step: int, *items: str) -> None:
        """Submit, plan, compute and commit a step."""
        for item in items:
            self.submit(item, "train")
        self.plan(step, *items)
        epoch = int(self.cluster.nodes(1)[0]["epoch"])
        attempt = self.begin(step, epoch)
        self.broker.call_many([self.gradients(step, attempt, stage) for stage in range(STAGES)])
        assert self.training.state().committed == step

    def snapshot(self, operation: str, kind: str) -> str:
        """Open an operation and have its shards written; returns the directory."""
        epoch = int(self.cluster.nodes(1)[0]["epoch"])
        self.versions.open(
            operation, kind, run=MAIN_RUN, root="/r", writers=[0] * STAGES, epochs=[epoch] * STAGES
        )
        self.versions.write_shards(operation)
        directory = self.versions.operation(operation)["directory"]
        for stage in range(STAGES):
            self.versions.shard_written(operation, stage, directory, {"stage": stage})
        return directory

    def publish(self, operation: str) -> str:
        """Publish the committed step; returns the version."""
        written = self.snapshot(operation, "publish")
        self.versions.prepare(operation, f"/r/{operation}", "abc", written=written)
        version = self.versions.operation(operation)["version"]
        epoch = int(self.cluster.nodes(1)[0]["epoch"])
        for stage in range(STAGES):
            self.versions.prepared(version, node=0, stage=stage, epoch=epoch)
        assert self.versions.publish(operation) == "ok"
        return version


@pytest.fixture
def store(broker: Broker) -> Store:
    """One node of two stages; this test leads."""
    settings = ClusterSettings(model="m", stages=STAGES, max_queue=5, max_deliveries=2)
    Cluster(broker).create(settings, MODEL, BYTES_TOKENIZER)
    made = Store(broker, settings)
    leader = made.cluster.lead("me", expiry_s=60)
    assert leader is not None
    made.leader = leader
    return made


# ------------------------------------------------------------------------------------------------------ submission
def test_an_id_is_accepted_once(store: Store) -> None:
    """Submitting it again says where it is, and is counted nowhere."""
    assert store.twice(lambda: store.submit("a")) == "queued"
    assert store.twice(lambda: store.submit("t", "train")) == "queued"
    assert store.totals() == {"submitted": "2", "open": "2"}
    assert store.broker.client.xlen(store.broker.keys.submissions) == 1
    assert store.broker.client.xlen(store.broker.keys.examples(MAIN_RUN)) == 1


def test_a_full_queue_refuses(store: Store) -> None:
    """At ``max_queue`` open items nothing new is accepted, what exists still is a no-op, an end makes room."""
    for index in range(5):
        store.submit(f"i{index}")
    with pytest.raises(QueueFull) as full:
        store.submit("more")
    assert (full.value.depth, full.value.retry_after_s > 0) == (5, True)
    assert "state" not in store.item("more")
    assert store.submit("i0") == "queued"
    assert store.items.cancel("i0")
    assert store.submit("more") == "queued"
    assert store.totals() == {"submitted": "6", "open": "5", "cancelled": "1", "refused": "1"}


def test_a_stopping_cluster_refuses(store: Store) -> None:
    """What it has goes on, what is new isn't accepted."""
    store.submit("a")
    store.twice(store.cluster.stop_accepting)
    with pytest.raises(ShuttingDown):
        store.submit("b")
    assert store.submit("a") == "queued"
    assert store.items.cancel("a")


def test_an_item_of_another_tokenizer_is_refused(store: Store) -> None:
    """Its ids mean something else here."""
    with pytest.raises(TokenizerMismatch):
        store.submit("a", tokenizer_sha256="0" * 64)
    assert store.totals() == {}


# ------------------------------------------------------------------------------------------- an inference item's life
def test_every_call_of_an_items_life_may_be_repeated(store: Store) -> None:
    """Dispatch, start, tokens and completion: each call twice, one effect; the client hears everything once."""
    store.submit("a")
    entry = store.submission()
    assert store.twice(store.items.dispatch(store.leader, entry, 0)) == ["ok"]
    stream = store.broker.keys.work(0)
    entries = store.broker.read_group(stream, STAGE_0, "w", block_s=0.001, count=1)
    ((started,), _) = store.twice(lambda: _started_once(store, entries))
    assert (started.prompt, started.reference, started.version, started.attempt) == ((1, 2), (3,), "0.0", 1)
    assert store.item("a")["deliveries"] == "1"
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {"0.0": "1"}
    assert store.twice(store.append("a", 1, 0, [7, 8])) == ["ok"]
    assert store.twice(store.append("a", 1, 1, [8, 9])) == ["ok"]
    assert store.unchanged_by(store.append("a", 1, 5, [1])) == ["gap"]
    assert store.items.tokens("a") == [7, 8, 9]
    assert store.twice(store.items.complete(started, 0, {"tokens": [7, 8, 9]})) == ["ok"]
    assert store.unchanged_by(store.append("a", 1, 3, [1])) == ["stale"]
    assert store.unchanged_by(store.items.fail(started, 0, "late")) == ["stale"]
    assert store.news() == ["a token", "a token", "a done"]
    assert store.totals() == {"submitted": "1", "done": "1"}
    assert store.broker.client.xlen(stream) == 0
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {}


def _started_once(store: Store, entries: list[Entry]) -> tuple[list[StartedItem], list[Entry]]:
    clock, store.broker.clock = store.broker.clock, _Stopped()
    try:
        return store.items.start(0, "w", entries)
    finally:
        store.broker.clock = clock


class _Stopped:
    """A clock that stands still, so that a repeated call is the same call."""

    def now(self) -> float:
        """Always then."""
        return 1000.0

    def sleep(self, seconds: float) -> None:
        """Not at all."""


def test_no_call_of_a_batch_overtakes_another(store: Store) -> None:
    """On a server that has lost its scripts (it was restarted) and has heard some of them again since."""
    first, second = store.start("a"), store.start("b")
    store.broker.client.script_flush()
    store.broker.call_many([store.items.complete(first, 0, {})])
    batch = [store.append("b", 1, 0, [7]), store.items.complete(second, 0, {"tokens": [7]})]
    assert store.broker.call_many(batch) == [["ok"], ["ok"]]
    assert store.news() == ["a done", "b token", "b done"]


def test_an_older_attempt_says_nothing_any_more(store: Store) -> None:
    """After a redispatch its start, tokens, result and failure are stale; the item's tokens stay and go on."""
    first = store.start("a")
    store.broker.call_many([store.append("a", 1, 0, [7])])
    (entry,) = store.items.work_of(0)
    redispatch = store.items.redispatch(store.leader, 0, entry, target=0, reason="lost")
    assert store.twice(redispatch) == ["ok"]
    assert store.unchanged_by(lambda: store.items.start(0, "w", [entry])[0]) == []
    assert store.unchanged_by(store.append("a", 1, 1, [8])) == ["stale"]
    assert store.unchanged_by(store.items.complete(first, 0, {})) == ["stale"]
    assert store.unchanged_by(store.items.fail(first, 0, "x")) == ["stale"]
    second = store.pull()
    assert (second.attempt, second.tokens, second.version) == (2, (7,), first.version)
    assert store.broker.call_many([store.append("a", 2, 1, [8])]) == [["ok"]]
    assert store.items.tokens("a") == [7, 8]
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {"0.0": "1"}


def test_an_item_goes_back_to_the_queue_when_no_node_is_ready(store: Store) -> None:
    """It is dispatched again from there."""
    store.start("a")
    (entry,) = store.items.work_of(0)
    assert store.twice(store.items.redispatch(store.leader, 0, entry, target=None, reason="lost")) == ["ok"]
    assert store.item("a")["state"] == "queued"
    store.broker.call_many([store.items.dispatch(store.leader, store.submission(), 0)])
    assert store.pull().attempt == 3


def test_an_item_is_given_up_after_so_many_deliveries(store: Store) -> None:
    """It fails once, with the reason, and stands among the dead letters."""
    for _ in range(2):
        started = store.start("a") if store.item("a") == {} else store.pull()
        (entry,) = store.items.work_of(0)
        redispatch = store.items.redispatch(store.leader, 0, entry, target=0, reason="its stages were lost")
        answer = store.twice(redispatch)
    assert (started.attempt, answer) == (2, ["dead"])
    assert store.item("a")["reason"] == "given up after 2 deliveries: its stages were lost"
    letters: Any = store.broker.client.xrange(store.broker.keys.dead_letters)
    assert [fields["item"] for _, fields in letters] == ["a"]
    assert store.news() == ["a failed"]
    assert store.totals() == {"submitted": "1", "failed": "1"}


def test_an_item_that_gets_further_is_not_given_up(store: Store) -> None:
    """However often its stages are lost: one that was the cause would lose them at the same token each time."""
    started = store.start("a")
    for position in range(5):
        append = store.append("a", started.attempt, position, [7])
        assert store.broker.call_many([append]) == [["ok"]]
        (entry,) = store.items.work_of(0)
        redispatch = store.items.redispatch(store.leader, 0, entry, target=0, reason="its stages were lost")
        assert store.twice(redispatch) == ["ok"]
        started = store.pull()
    assert (started.attempt, store.item("a")["deliveries"]) == (6, "1")


def test_an_item_is_not_given_up_for_what_happens_before_it_begins(store: Store) -> None:
    """A node's placement may change many times before the item is started there."""
    store.submit("a")
    store.broker.call_many([store.items.dispatch(store.leader, store.submission(), 0)])
    for _ in range(5):
        (entry,) = store.items.work_of(0)
        redispatch = store.items.redispatch(store.leader, 0, entry, target=0, reason="its stages were lost")
        assert store.twice(redispatch) == ["ok"]
    assert store.pull().attempt == 6


def test_a_failure_ends_an_item_once(store: Store) -> None:
    """With its reason."""
    started = store.start("a")
    assert store.twice(store.items.fail(started, 0, "too hot")) == ["ok"]
    assert (store.item("a")["state"], store.item("a")["reason"]) == ("failed", "too hot")
    assert store.news() == ["a failed"]


@pytest.mark.parametrize("when", ["queued", "dispatched", "running"])
def test_a_cancelled_item_ends_once(store: Store, when: str) -> None:
    """Whenever it is cancelled; what its node says afterwards is stale, and closing its entry leaves nothing."""
    if when == "running":
        started = store.start("a")
    else:
        store.submit("a")
    if when == "dispatched":
        store.broker.call_many([store.items.dispatch(store.leader, store.submission(), 0)])
    assert store.items.cancel("a")
    assert store.unchanged_by(lambda: store.items.cancel("a")) is False
    assert (store.news(), store.totals()) == (["a cancelled"], {"submitted": "1", "cancelled": "1"})
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {}
    if when == "queued":
        store.broker.call_many([store.items.dispatch(store.leader, store.submission(), 0)])
    for entry in store.items.work_of(0):
        if when == "running":
            assert store.unchanged_by(store.append("a", started.attempt, 0, [1])) == ["stale"]
        store.twice(store.items.close_entry(0, entry.id))
    assert store.broker.client.xlen(store.broker.keys.work(0)) == 0
    assert store.broker.client.xlen(store.broker.keys.submissions) == 0


@pytest.mark.parametrize("state", ["queued", "dispatched", "running"])
def test_a_deadline_ends_an_item_once(store: Store, state: str) -> None:
    """Wherever it is: it fails with the reason, its node is told, and what that says afterwards is stale."""
    clock = store.broker.clock = ManualClock(1000.0)
    started = store.bring("a", state, deadline_at=1060.0)
    clock.sleep(59.0)
    assert store.unchanged_by(lambda: store.items.end_overdue(store.leader)) == []
    clock.sleep(1.0)
    assert store.twice(lambda: store.items.end_overdue(store.leader)) == ["a"]
    assert store.item("a")["reason"] == f"deadline passed while {state}"
    assert (store.news(), store.totals()) == (["a failed"], {"submitted": "1", "failed": "1"})
    assert store.told("ItemCancelled") == ([] if state == "queued" else ["a"])
    assert store.unchanged_by(lambda: store.items.cancel("a")) is False
    if started:
        assert store.unchanged_by(store.append("a", 1, 0, [7])) == ["stale"]
        assert store.broker.call_many([store.items.complete(started, 0, {})]) == [["stale"]]
    assert store.item("a")["state"] == "failed"
    store.clear_away()


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_an_item_that_ended_has_no_deadline(store: Store, end: str) -> None:
    """Whatever ended it first stays."""
    clock = store.broker.clock = ManualClock(1000.0)
    started = store.bring("a", "running", deadline_at=1060.0)
    assert started is not None
    match end:
        case "done":
            store.broker.call_many([store.items.complete(started, 0, {})])
        case "failed":
            store.broker.call_many([store.items.fail(started, 0, "too hot")])
        case _:
            assert store.items.cancel("a")
    clock.sleep(61.0)
    assert store.unchanged_by(lambda: store.items.end_overdue(store.leader)) == []
    assert store.item("a")["state"] == end
    store.clear_away()


def test_a_deadline_that_has_passed_is_refused(store: Store) -> None:
    """Nothing is queued; the id of an item that exists is a no-op all the same."""
    clock = store.broker.clock = ManualClock(1000.0)
    with pytest.raises(BadInput, match="deadline of item a has passed"):
        store.submit("a", deadline_at=1000.0)
    assert store.item("a") == {}
    store.submit("a", deadline_at=1060.0)
    clock.sleep(61.0)
    assert store.submit("a", deadline_at=1060.0) == "queued"
    assert store.totals() == {"submitted": "1", "open": "1"}


def test_an_examples_deadline_is_over_when_its_step_is_planned(store: Store) -> None:
    """A queued one fails, and its step is made without it; a planned one is learned."""
    clock = store.broker.clock = ManualClock(1000.0)
    for example in ("t1", "t2"):
        store.submit(example, "train", deadline_at=1060.0)
    store.plan(1, "t1")
    clock.sleep(61.0)
    assert store.twice(lambda: store.items.end_overdue(store.leader)) == ["t2"]
    assert (store.item("t1")["state"], store.item("t2")["state"]) == ("planned", "failed")
    assert store.broker.client.ttl(store.broker.keys.item("t2")) > 0
    assert not store.broker.client.exists(store.broker.keys.item_payload("t2"), store.broker.keys.deadlines)


@pytest.mark.parametrize("state", ["queued", "dispatched", "running"])
def test_an_abandoned_item_is_cancelled_once(store: Store, state: str) -> None:
    """When its client's key is gone, wherever it is; others of the client go on."""
    started = store.bring("a", state, while_connected=1)
    store.submit("asked for later")
    assert store.unchanged_by(lambda: store.items.cancel_abandoned(store.leader)) == []
    store.broker.client.delete(store.broker.keys.client_alive("me"))
    assert store.twice(lambda: store.items.cancel_abandoned(store.leader)) == ["a"]
    assert (store.item("a")["state"], store.item("asked for later")["state"]) == ("cancelled", "queued")
    assert store.news() == ["a cancelled"]
    assert store.told("ItemCancelled") == ([] if state == "queued" else ["a"])
    if started:
        assert store.unchanged_by(store.append("a", 1, 0, [7])) == ["stale"]
    assert store.items.cancel("asked for later")
    store.clear_away()


def test_a_client_is_known_while_something_ends_with_it(store: Store) -> None:
    """It shows itself, or leaves; with the last such item all that is known of it goes, and it shows no more."""
    keys, client = store.broker.keys, store.broker.client
    first = store.bring("a", "running", while_connected=1)
    store.submit("b", while_connected=1)
    client.delete(keys.client_alive("me"))
    assert store.items.still_here("me") == store.settings.client_expiry_s
    assert 0 < client.pttl(keys.client_alive("me")) <= 1000 * store.settings.client_expiry_s
    assert store.unchanged_by(lambda: store.items.cancel_abandoned(store.leader)) == []
    assert first is not None
    store.broker.call_many([store.items.complete(first, 0, {})])
    assert client.smembers(keys.client_items("me")) == {"b"}
    store.twice(lambda: store.items.leave("me"))
    assert (store.item("a")["state"], store.item("b")["state"]) == ("done", "cancelled")
    store.unchanged_by(lambda: store.items.still_here("me"))
    store.clear_away()


def test_what_has_ended_is_not_cancelled_with_its_client(store: Store) -> None:
    """Even if the client's list still had it."""
    started = store.bring("a", "running", while_connected=1)
    assert started is not None
    store.broker.call_many([store.items.complete(started, 0, {})])
    store.broker.client.sadd(store.broker.keys.client_items("me"), "a")
    store.items.leave("me")
    assert (store.item("a")["state"], store.totals()) == ("done", {"submitted": "1", "done": "1"})
    store.clear_away()


def test_an_items_turn_is_told_to_its_node(store: Store) -> None:
    """Its priority, and when the broker accepted it: the same after its stages were lost."""
    store.bring("a", "running", priority=3)
    (entry,) = store.items.work_of(0)
    about = {"item": "a", "attempt": "1", "priority": "3", "accepted_at": store.item("a")["accepted_at"]}
    assert entry.fields == about
    assert store.begin_again("a").fields["priority"] == "3"
    (entry,) = store.items.work_of(0)
    assert entry.fields == about | {"attempt": "2"}


def test_nobody_cancels_what_is_not_there(store: Store) -> None:
    """Or asks for it."""
    with pytest.raises(ItemUnknown):
        store.items.cancel("nothing")
    with pytest.raises(ItemUnknown):
        store.items.get("nothing")


def test_a_consumer_that_holds_an_entry_is_not_forgotten(store: Store) -> None:
    """Redis would drop the entry from every list of what is pending, and the item would be lost."""
    store.start("a")
    store.unchanged_by(lambda: store.items.forget_consumer(store.leader, 0, "w"))
    (entry,) = store.items.work_of(0)
    store.broker.call_many([store.items.close_entry(0, entry.id)])
    store.items.forget_consumer(store.leader, 0, "w")
    assert store.broker.client.xinfo_consumers(store.broker.keys.work(0), STAGE_0) == []


# ------------------------------------------------------------------------------------------------------- leadership
def test_one_coordinator_leads(store: Store) -> None:
    """It keeps the lead by asking; another one gets it, in a new epoch, when it is given back."""
    assert store.cluster.lead("me", expiry_s=60) == store.leader
    assert store.cluster.lead("other", expiry_s=60) is None
    store.cluster.resign("other")
    assert store.cluster.lead("other", expiry_s=60) is None
    store.twice(lambda: store.cluster.resign("me"))
    assert store.cluster.lead("other", expiry_s=60) == store.leader + 1


def test_an_older_leader_changes_nothing(store: Store) -> None:
    """Every call that only a leader may make is refused in an older epoch."""
    store.place()
    store.commit(1, "t1", "t2")
    store.publish("p")
    started = store.start("a")
    store.submit("b")
    store.submit("t3", "train")
    waiting = store.submission()
    (example,) = store.training.queued_examples(1)
    (work,) = store.items.work_of(0)
    planned = store.training.step(1)
    seen = store.training.state()
    store.cluster.resign("me")
    store.cluster.lead("other", expiry_s=60)
    old = store.leader
    loading = {"run": MAIN_RUN, "step": 0, "directory": "", "nodes": [0], "epochs": [1]}
    late: list[Call | Callable[[], object]] = [
        store.items.dispatch(old, waiting, 0),
        store.items.redispatch(old, 0, work, target=0, reason="x"),
        lambda: store.items.forget_consumer(old, 0, "w"),
        lambda: store.cluster.forget_worker(old, "w0"),
        lambda: store.cluster.place(old, 0, ["x", "y"]),
        lambda: store.training.plan(old, planned, cursor=example.id),
        lambda: store.training.drop_examples(old, [example]),
        lambda: store.training.start_step(
            old, 2, weights=1, members=[0], epochs=[1], shard_nodes=[0], seen=seen
        ),
        lambda: store.items.end_overdue(old),
        lambda: store.items.cancel_abandoned(old),
        lambda: store.training.forget_steps(old, 1),
        lambda: store.versions.retire(old),
        lambda: store.versions.load_training(old, seen_attempt=seen.attempt, **loading),  # type: ignore[arg-type]
    ]
    before = everything(store.broker)
    for call in late:
        if callable(call):
            with pytest.raises(Fenced):
                call()
        else:
            assert store.broker.call_many([call]) == [["fenced"]]
    assert everything(store.broker) == before
    assert started.item == "a"


# -------------------------------------------------------------------------------------------- workers and placement
def test_a_new_process_takes_its_slot_over(store: Store) -> None:
    """The one that had it is dead at once; beating on doesn't bring it back."""
    about = {"slot": "s", "registered_at": "1.0"}
    store.twice(lambda: store.cluster.register("old", about, expiry_s=60))
    assert store.cluster.beat("old", 7, expiry_s=60)
    assert store.cluster.workers()["old"]["alive"] == "7"
    store.cluster.register("new", about | {"registered_at": "2.0"}, expiry_s=60)
    assert "alive" not in store.cluster.workers()["old"]
    store.twice(lambda: store.cluster.forget_worker(store.leader, "old"))
    assert not store.cluster.beat("old", 8, expiry_s=60)
    assert list(store.cluster.workers()) == ["new"]


def test_a_stage_reports_only_for_its_own_placement(store: Store) -> None:
    """Another worker's word, or one of an older epoch, changes nothing."""
    epoch = store.place()
    store.twice(lambda: store.ready(0, epoch))
    store.unchanged_by(lambda: store.ready(0, epoch - 1))
    strange = {"node": 0, "stage": 0, "versions": ["0.0"], "layers": [0, 0], "memory_bytes": 1}
    store.unchanged_by(lambda: store.cluster.stage_ready("x", epoch=epoch, training=Version(0, 9), **strange))  # type: ignore[arg-type]
    store.unchanged_by(
        store.cluster.training_at("w0", node=0, stage=0, epoch=epoch - 1, training=Version(0, 9))
    )
    store.unchanged_by(store.cluster.training_at("x", node=0, stage=0, epoch=epoch, training=Version(0, 9)))
    store.unchanged_by(lambda: store.cluster.link_lost(0, epoch - 1, "w1"))
    assert store.twice(
        store.cluster.training_at("w0", node=0, stage=0, epoch=epoch, training=Version(0, 9))
    ) == ["ok"]
    store.twice(lambda: store.cluster.link_lost(0, epoch, "w1"))
    assert store.broker.hash(store.broker.keys.node(0))["training:0"] == "9"


def test_a_stage_is_ready_only_with_every_live_version(store: Store) -> None:
    """It is told which it lacks: the served, the draining, the one that is being prepared."""
    store.place()
    store.commit(1, "t1", "t2")
    store.publish("p1")
    epoch = int(store.cluster.nodes(1)[0]["epoch"])
    missing, retired = store.ready(0, epoch, ())
    assert (sorted(missing), retired) == (["0.0", "0.1"], [])
    assert store.versions.retire(store.leader) == ("0.0", "")
    store.commit(2, "t3", "t4")
    written = store.snapshot("p2", "publish")
    store.versions.prepare("p2", "/r/p2", "abc", written=written)
    store.cluster.place(store.leader, 0, ["w0", "w1"])
    epoch = int(store.cluster.nodes(1)[0]["epoch"])
    assert store.ready(0, epoch, ("0.1",)) == (["0.2"], [])
    assert "ready:0" not in store.broker.hash(store.broker.keys.node(0))
    assert store.ready(0, epoch, ("0.1", "0.2", "0.3")) == ([], ["0.3"])
    assert store.broker.hash(store.broker.keys.node(0))["ready:0"] == str(epoch)
    assert "prepared:0:0" in store.versions.version("0.2")


# --------------------------------------------------------------------------------------------------------- training
def test_every_call_of_a_step_may_be_repeated(store: Store) -> None:
    """Plan, start, gradients, commit: one step, each example in it once."""
    epoch = store.place()
    store.submit("t1", "train")
    store.submit("t2", "train")
    assert store.plan(1, "t1", "t2") == "ok"
    assert store.unchanged_by(lambda: store.plan(1, "t1", "t2")) == "stale"
    assert store.training.queued_examples(9) == []
    seen = store.training.state()
    start = {"members": [0], "epochs": [epoch], "shard_nodes": [0, 0, 0, 0], "seen": seen, "weights": 0}
    assert store.training.start_step(store.leader, 1, **start) == "ok"  # type: ignore[arg-type]
    again = lambda: store.training.start_step(store.leader, 1, **start)  # type: ignore[arg-type]  # noqa: E731
    assert store.unchanged_by(again) == "stale"
    assert store.training.state().in_flight
    assert store.twice(store.gradients(1, 1, 0)) == ["waiting"]
    assert store.item("t1")["state"] == "planned"
    assert store.twice(store.gradients(1, 1, 1)) == ["ok"]
    run = store.training.state()
    assert (run.committed, run.in_flight) == (1, False)
    assert {store.item(item)["state"] for item in ("t1", "t2")} == {"committed"}
    assert store.broker.hash(store.broker.keys.step(MAIN_RUN, 1))["loss"] == "0.75"
    assert store.cluster.nodes(1)[0]["training:1"] == "1"


def test_gradients_of_an_older_attempt_count_nothing(store: Store) -> None:
    """Only the newest attempt can commit, and only with all of its own reports."""
    epoch = store.place()
    store.submit("t1", "train")
    store.plan(1, "t1")
    first = store.begin(1, epoch)
    store.broker.call_many([store.gradients(1, first, 0)])
    second = store.begin(1, epoch)
    assert store.unchanged_by(store.gradients(1, first, 1)) == ["stale"]
    assert store.broker.call_many([store.gradients(1, second, 1)]) == [["waiting"]]
    assert store.training.state().committed == 0
    assert store.broker.call_many([store.gradients(1, second, 0)]) == [["ok"]]
    assert store.training.state().committed == 1


def test_a_replay_commits_nothing_twice(store: Store) -> None:
    """It moves the node's training state on, not the run; its items and loss stay as they are."""
    epoch = store.place()
    store.commit(1, "t1", "t2")
    committed = store.broker.hash(store.broker.keys.step(MAIN_RUN, 1))
    state = store.training.state()
    store.versions.load_training(
        store.leader,
        run=MAIN_RUN,
        step=0,
        directory="",
        nodes=[0],
        epochs=[epoch],
        seen_attempt=state.attempt,
    )
    assert "training:0" not in store.cluster.nodes(1)[0]
    attempt = store.begin(1, epoch)
    for stage in range(STAGES):
        store.twice(store.gradients(1, attempt, stage))
    assert store.training.state().committed == 1
    assert store.broker.hash(store.broker.keys.step(MAIN_RUN, 1)) == committed
    assert store.cluster.nodes(1)[0]["training:0"] == "1"


def test_a_planned_example_is_not_cancelled(store: Store) -> None:
    """Its step is fixed; one that is cancelled before is not planned."""
    store.submit("t1", "train")
    store.submit("t2", "train")
    assert store.items.cancel("t2")
    assert store.plan(1, "t1", "t2") == "changed"
    (_, gone) = store.training.queued_examples(2)
    store.twice(lambda: store.training.drop_examples(store.leader, [gone]))
    assert store.plan(1, "t1") == "ok"
    with pytest.raises(BadInput, match="planned"):
        store.items.cancel("t1")
    assert store.totals() == {"submitted": "2", "open": "1", "cancelled": "1"}


def test_a_flush_says_what_waits(store: Store) -> None:
    """Nothing, or examples that a step of its own is planned for."""
    assert store.twice(store.training.flush) == (0, "")
    store.submit("t1", "train")
    newest = store.training.queued_examples(1)[0].id
    assert store.twice(store.training.flush) == (0, newest)
    assert store.training.state().flushes == (newest,)


def test_a_second_flush_does_not_replace_the_first(store: Store) -> None:
    """Both wait for the planner, in order; each is forgotten with the step that reaches it."""
    waiting = []
    for item in ("t1", "t2"):
        store.submit(item, "train")
        waiting.append(store.training.flush()[1])
    assert store.training.state().flushes == tuple(waiting)
    assert store.plan(1, "t1") == "ok"
    assert store.training.state().flushes == tuple(waiting[1:])
    assert store.plan(2, "t2") == "ok"
    assert store.training.state().flushes == ()


# --------------------------------------------------------------------------------------------------------- versions
def test_every_call_of_a_publish_may_be_repeated(store: Store) -> None:
    """Open, write, prepare, publish, retire: one flip, and the step's examples are done once."""
    epoch = store.place()
    store.commit(1, "t1", "t2")
    versions = store.versions
    opened = {"run": MAIN_RUN, "root": "/r", "writers": [0, 0], "epochs": [epoch] * 2}
    store.twice(lambda: versions.open("p", "publish", **opened))  # type: ignore[arg-type]
    store.twice(lambda: versions.write_shards("p"))
    directory = versions.operation("p")["directory"]
    store.unchanged_by(lambda: versions.shard_written("p", 0, "/r/another-try", {}))
    for stage in range(STAGES):
        store.twice(partial(versions.shard_written, "p", stage, directory, {"stage": stage}))
    store.broker.clock = _Stopped()
    store.unchanged_by(lambda: versions.prepare("p", "/r/0.1", "abc", written="/r/another-try"))
    store.twice(lambda: versions.prepare("p", "/r/0.1", "abc", written=directory))
    assert versions.publish("p") == "waiting"
    for stage in range(STAGES):
        store.twice(partial(versions.prepared, "0.1", node=0, stage=stage, epoch=epoch))
    assert store.twice(lambda: versions.publish("p")) == "ok"
    assert versions.live() == {"served": "0.1", "draining": "0.0"}
    assert store.news() == ["t1 done", "t2 done"]
    assert (store.totals(), store.training.state().published) == ({"submitted": "2", "done": "2"}, 1)
    assert versions.retire(store.leader) == ("0.0", "")
    assert store.unchanged_by(lambda: versions.retire(store.leader)) is None
    assert versions.in_progress() == {}


def test_a_version_in_use_is_not_retired(store: Store) -> None:
    """An item keeps the version it started on, also over a redispatch; the next one starts on the new one."""
    store.place()
    old = store.start("a")
    store.commit(1, "t1", "t2")
    store.publish("p")
    assert store.versions.retire(store.leader) is None
    (entry,) = store.items.work_of(0)
    store.broker.call_many([store.items.redispatch(store.leader, 0, entry, target=0, reason="lost")])
    again = store.pull()
    assert (old.version, again.version) == ("0.0", "0.0")
    assert store.start("b").version == "0.1"
    store.broker.call_many([store.items.complete(again, 0, {})])
    assert store.versions.retire(store.leader) == ("0.0", "")


def test_every_call_of_a_move_may_be_repeated(store: Store) -> None:
    """The item goes on upon the served version and counts there; what it has keeps its version."""
    epoch, updates = store.place(), Updates(store.broker)
    old = store.start("a")
    move = updates.move("a", 1, node=0, epoch=epoch)
    assert store.unchanged_by(move) == ["ok", "0.0"]
    store.broker.call_many([store.append("a", 1, 0, [7, 8])])
    store.commit(1, "t1", "t2")
    store.publish("p1")
    assert store.unchanged_by(updates.move("a", 0, node=0, epoch=epoch)) == ["stale"]
    assert store.unchanged_by(updates.move("a", 1, node=0, epoch=epoch - 1)) == ["ok", "0.0"]
    assert store.twice(move) == ["ok", "0.1"]
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {"0.1": "1"}
    assert store.versions.retire(store.leader) == ("0.0", "")
    store.commit(2, "t3", "t4")
    store.publish("p2")
    assert store.twice(move) == ["ok", "0.2"]  # no token came from 0.1
    store.broker.call_many(
        [store.append("a", 1, 2, [9]), store.items.complete(old, 0, {"tokens": [7, 8, 9]})]
    )
    assert store.item("a")["version_spans"] == '[[0,"0.0"],[2,"0.2"]]'
    replies: Any = store.broker.client.xrange(store.broker.keys.replies("me"))
    told = [reply for _, fields in replies for reply in read_replies(fields) if reply.item == "a"]
    assert [getattr(reply, "version_spans", reply.weights_version) for reply in told] == [
        *("0.0", "0.2"),
        ((0, "0.0"), (2, "0.2")),
    ]
    assert store.broker.hash(store.broker.keys.versions_in_flight) == {}


@pytest.mark.parametrize("rule", ["rebuild", "finish"])
def test_an_item_that_begins_again_may_begin_on_the_served_version(store: Store, rule: str) -> None:
    """If it rebuilds; one that finishes, only once its version has been cleared. The tokens it has keep theirs."""
    store.place()
    store.submit("a", on_update=rule)
    store.broker.call_many([store.items.dispatch(store.leader, store.submission(), 0)])
    store.pull()
    store.broker.call_many([store.append("a", 1, 0, [7])])
    store.commit(1, "t1", "t2")
    store.publish("p")
    assert store.begin_again("a").version == ("0.1" if rule == "rebuild" else "0.0")
    store.broker.call_many([store.append("a", 2, 1, [8])])
    if rule == "finish":
        assert "version_spans" not in store.item("a")
        assert Updates(store.broker).clear_draining(store.leader, "0.0")
        assert store.begin_again("a").version == "0.1"
    assert store.item("a")["version_spans"] == f'[[0,"0.0"],[{1 if rule == "rebuild" else 2},"0.1"]]'
    assert store.versions.retire(store.leader) == ("0.0", "")


def test_only_the_draining_version_is_cleared(store: Store) -> None:
    """Once, by the leader, with one notice to the workers."""
    updates = Updates(store.broker)
    store.place()
    store.start("a")
    assert not store.unchanged_by(lambda: updates.clear_draining(store.leader, "0.0"))
    store.commit(1, "t1", "t2")
    store.publish("p")
    with pytest.raises(Fenced):
        updates.clear_draining(store.leader - 1, "0.0")
    assert [updates.clear_draining(store.leader, "0.0") for _ in range(2)] == [True, False]
    control: Any = store.broker.client.xrange(store.broker.keys.control)
    cleared = [fields["version"] for _, fields in control if fields["type"] == "VersionCleared"]
    assert cleared == ["0.0"]


def test_an_item_is_updated_as_the_cluster_says_unless_it_says_so_itself(store: Store) -> None:
    """The rule is the item's from its submission on."""
    store.submit("a")
    store.submit("b", on_update="rebuild")
    assert [store.item(name)["on_update"] for name in "ab"] == ["finish", "rebuild"]


def test_no_third_version_is_prepared(store: Store) -> None:
    """While one drains; whoever asks for it, as a publish that a rollback has overtaken."""
    store.place()
    store.start("a")
    store.commit(1, "t1", "t2")
    store.publish("p1")
    store.commit(2, "t3", "t4")
    written = store.snapshot("p2", "publish")
    store.unchanged_by(lambda: store.versions.prepare("p2", "/r/p2", "abc", written=written))
    assert store.versions.operation("p2")["state"] == "writing"
    assert store.versions.live() == {"served": "0.1", "draining": "0.0"}


def test_a_version_published_again_stays_served(store: Store) -> None:
    """A second operation for the same step, opened by a leader that had not seen the first one end, retires nothing."""
    store.place()
    store.commit(1, "t1", "t2")
    store.publish("p1")
    assert store.versions.retire(store.leader) == ("0.0", "")
    store.publish("p2")
    assert store.versions.live() == {"served": "0.1"}
    assert store.versions.retire(store.leader) is None
    assert store.versions.in_progress() == {}


def test_a_snapshot_that_lost_a_writer_begins_again(store: Store) -> None:
    """In another directory; what the first try's writers still report is not taken."""
    store.place()
    first = store.snapshot("c", "checkpoint")
    store.versions.choose_writers(store.leader, "c", "writing", [0, 0], [2, 2])
    assert not any(name.startswith("shard:") for name in store.versions.operation("c"))
    again = partial(store.versions.choose_writers, store.leader, "c", "writing", [0, 0], [3, 3])
    store.unchanged_by(again)
    store.versions.write_shards("c")
    assert store.versions.operation("c")["directory"] != first
    store.unchanged_by(lambda: store.versions.shard_written("c", 0, first, {}))
    store.unchanged_by(lambda: store.versions.advance("c", "requested", "failed"))
    assert store.versions.advance("c", "writing", "failed", {"reason": "disk full"})
    assert store.versions.in_progress() == {}


def test_a_checkpoint_never_goes_back(store: Store) -> None:
    """One that was begun earlier and sealed later doesn't replace the newer one, whose payloads may be gone."""
    store.place()
    store.commit(1, "t1", "t2")
    early = store.snapshot("early", "checkpoint")
    store.commit(2, "t3", "t4")
    late = store.snapshot("late", "checkpoint")
    store.unchanged_by(lambda: store.versions.seal("late", "/r/0.2", "b", written=early))
    store.twice(lambda: store.versions.seal("late", "/r/0.2", "b", written=late))
    store.twice(lambda: store.versions.seal("early", "/r/0.1", "a", written=early))
    run = store.training.state()
    assert (run.checkpoint, run.checkpoint_directory) == (2, "/r/0.2")


# -------------------------------------------------------------------------------------------------------- rollbacks
def checkpointed(store: Store, operation: str) -> str:
    """Write a checkpoint of the committed step; returns its directory."""
    written = store.snapshot(operation, "checkpoint")
    directory = f"/r/{operation}"
    store.versions.seal(operation, directory, "abc", written=written)
    return directory


def test_every_call_of_a_rollback_may_be_repeated(store: Store) -> None:
    """Open, begin, publish: one flip of what is served and what is trained; nothing is committed in between."""
    epoch = store.place()
    store.commit(1, "t1", "t2")
    directory = checkpointed(store, "c")
    store.commit(2, "t3", "t4")
    rollbacks, versions = Rollbacks(store.broker, MAIN_RUN), store.versions
    store.broker.clock = _Stopped()
    store.twice(lambda: rollbacks.open("r", Version(0, 1)))
    with pytest.raises(BadInput, match="on its way"):
        rollbacks.open("another", Version(0, 1))
    attempt = store.training.state().attempt
    store.twice(lambda: rollbacks.begin("r", "abc"))
    run = store.training.state()
    assert (run.rolling_back, run.in_flight, run.attempt) == ("r", False, attempt + 1)
    store.submit("t5", "train")
    assert store.plan(3, "t5") == "ok"
    assert store.unchanged_by(partial(store.begin, 3, epoch)) == run.attempt, "no step is begun"
    assert versions.publish("r") == "waiting"
    for stage in range(STAGES):
        store.twice(partial(versions.prepared, "1.2", node=0, stage=stage, epoch=epoch))
    assert store.twice(lambda: versions.publish("r")) == "ok"
    run = store.training.state()
    assert (run.lineage, run.base, run.committed, run.published, run.rolling_back) == (1, 2, 2, 2, "")
    assert (run.checkpoint, run.checkpoint_directory) == (2, directory)
    assert versions.live() == {"served": "1.2", "draining": "0.0"}
    assert "training:0" not in store.cluster.nodes(1)[0]
    assert store.news() == ["t1 done", "t2 done", "t3 done", "t4 done"]
    assert versions.published(1)[0]["parent"] == "0.1"


def test_a_training_state_of_a_lineage_that_was_left_is_none(store: Store) -> None:
    """However late a stage speaks of it: the state of the same step is another one now."""
    epoch = store.place()
    rollbacks = Rollbacks(store.broker, MAIN_RUN)
    rollbacks.open("r", Version(0, 0))
    rollbacks.begin("r", "")
    for stage in range(STAGES):
        store.versions.prepared("1.0", node=0, stage=stage, epoch=epoch)
    assert store.versions.publish("r") == "ok"
    late = partial(store.cluster.training_at, "w0", node=0, stage=0, epoch=epoch)
    assert store.unchanged_by(late(training=Version(0, 0))) == ["stale"]
    assert store.twice(late(training=Version(1, 0))) == ["ok"]
    about = {"node": 0, "stage": 0, "epoch": epoch, "versions": ["1.0", "0.0"], "layers": [0, 0]}
    store.cluster.stage_ready("w0", training=Version(0, 0), memory_bytes=1, **about)  # type: ignore[arg-type]
    assert "training:0" not in store.cluster.nodes(1)[0]


def test_what_was_being_written_is_written_again_of_the_new_lineage(store: Store) -> None:
    """A checkpoint that somebody asked for just before is of what was gone back to."""
    epoch = store.place()
    written = store.snapshot("c", "checkpoint")
    rollbacks = Rollbacks(store.broker, MAIN_RUN)
    rollbacks.open("r", Version(0, 0))
    rollbacks.begin("r", "")
    for stage in range(STAGES):
        store.versions.prepared("1.0", node=0, stage=stage, epoch=epoch)
    assert store.versions.publish("r") == "ok"
    assert store.versions.operation("c")["state"] == "requested"
    store.unchanged_by(lambda: store.versions.shard_written("c", 0, written, {}))
    store.unchanged_by(lambda: store.versions.seal("c", "/r/0.0", "a", written=written))
    store.versions.write_shards("c")
    assert store.versions.operation("c")["version"] == "1.0"


def test_a_version_that_no_stage_can_load_is_withdrawn(store: Store) -> None:
    """Nothing is served or trained otherwise than before, and its name is not used again."""
    store.place()
    rollbacks, versions = Rollbacks(store.broker, MAIN_RUN), store.versions
    rollbacks.open("r", Version(0, 0))
    rollbacks.begin("r", "")
    store.twice(lambda: versions.refuse("1.0", "a file was changed"))
    assert versions.live() == {"served": "0.0"}
    assert not store.unchanged_by(partial(versions.prepared, "1.0", node=0, stage=0, epoch=1))
    assert store.training.state().rolling_back == ""
    assert versions.advance("r", "withdrawn", "failed")
    assert versions.operation("r")["reason"] == "a file was changed"
    rollbacks.open("again", Version(0, 0))
    rollbacks.begin("again", "")
    assert versions.operation("again")["version"] == "2.0"


def test_a_checkpoint_in_use_is_kept(store: Store) -> None:
    """The run's own, one that is served, and one that is being gone back to; any other may go, once."""
    epoch = store.place()
    for step in (1, 2, 3):
        store.commit(step, f"a{step}")
        checkpointed(store, f"c{step}")
    rollbacks = Rollbacks(store.broker, MAIN_RUN)
    assert [str(version) for version in rollbacks.checkpoints()] == ["0.0", "0.1", "0.2", "0.3"]
    rollbacks.open("r", Version(0, 2))
    for version in (Version(0, 2), Version(0, 3)):
        assert store.unchanged_by(partial(rollbacks.forget_checkpoint, version)) is None
    assert store.twice(lambda: rollbacks.forget_checkpoint(Version(0, 1))) == "/r/c1"
    rollbacks.begin("r", "abc")
    for stage in range(STAGES):
        store.versions.prepared("1.3", node=0, stage=stage, epoch=epoch)
    assert store.versions.publish("r") == "ok"
    assert rollbacks.forget_checkpoint(Version(0, 3)) == "/r/c3"
    assert store.unchanged_by(partial(rollbacks.forget_checkpoint, Version(0, 2))) is None


# ------------------------------------------------------------------------------------------------------ what remains
FIXED = (
    "cluster settings model tokenizer leader leader_epoch control totals workers placement_epoch node:0 node:0:work "
    "submissions run:main run:main:checkpoints run:main:examples run:main:ready versions versions:log events"
).split()


def test_only_fixed_keys_remain(broker: Broker) -> None:
    """After a run of every kind of item, all that doesn't expire by itself is the cluster's own few keys."""
    settings = ClusterSettings(model="m", result_ttl_s=1.0)
    Cluster(broker).create(settings, MODEL, BYTES_TOKENIZER)
    scripted = ScriptedWorker(broker)
    scripted.join()
    store = Store(broker, settings, leader=scripted.leader_epoch)
    for round_ in range(3):
        bound: dict[str, Any] = {"while_connected": 1, "deadline_at": broker.clock.now() + 3600}
        store.submit(f"generate-{round_}", "generate", max_new_tokens=3, **bound)
        store.submit(f"score-{round_}", "score")
        for index in range(2):
            store.submit(f"train-{round_}-{index}", "train")
        scripted.work()
    store.submit("cancelled", "score")
    store.submit("cancelled-example", "train")
    assert all(store.items.cancel(item) for item in ("cancelled", "cancelled-example"))
    scripted.work()
    store.training.drop_examples(store.leader, store.training.queued_examples(9))
    assert store.totals() == {"submitted": "14", "done": "12", "cancelled": "2"}
    _checkpoint_of_one_stage(store)
    store.twice(lambda: store.training.forget_steps(store.leader, 3))
    client: Any = broker.client
    served = store.versions.live()["served"]
    own = {broker.keys.prefix + name for name in FIXED}
    own |= {broker.keys.worker("scripted"), broker.keys.alive("scripted"), broker.keys.version(served)}
    assert {key for key in client.keys(f"{broker.keys.prefix}*") if client.ttl(key) < 0} <= own
    wait_until(
        lambda: not [key for key in client.keys("*") if "item:" in key or "replies:" in key],
        what="results have expired",
        timeout_s=5.0,
    )
    assert [
        client.xlen(broker.keys.prefix + name) for name in ("submissions", "node:0:work", "run:main:examples")
    ] == [
        0,
        0,
        0,
    ]


def _checkpoint_of_one_stage(store: Store) -> None:
    store.versions.open("c", "checkpoint", run=MAIN_RUN, root="/r", writers=[0], epochs=[1])
    store.versions.write_shards("c")
    store.versions.seal("c", "/r/0.3", "a", written=store.versions.operation("c")["directory"])
    assert store.training.state().checkpoint == 3
