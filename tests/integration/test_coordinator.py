"""The coordinator, turn by turn: its workers are hashes that a test writes, its clock is the test's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from integration.scripted_worker import BYTES_TOKENIZER, MODEL
from lemix_common.broker import Broker
from lemix_common.clock import ManualClock
from lemix_common.errors import Fenced
from lemix_common.ids import BASE_VERSION
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import COORDINATORS, STAGE_0, Items
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.training import Training
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies import Policy, PolicyOptions, make_policy
from lemix_coordinator.scheduling.work import Decision, Resize, Work

NODES, STAGES = 2, 2


@dataclass
class NoTransitions:
    """Notes what would be asked of the operations workers."""

    asked: list[str] = field(default_factory=list)

    def advance(self, operation: str) -> None:
        """Note it."""
        self.asked.append(operation)

    def remove(self, version: str, directory: str) -> None:
        """Note it."""
        self.asked.append(f"remove {version} {directory}")


@dataclass
class Scene:
    """A cluster whose workers only exist in Redis."""

    broker: Broker
    clock: ManualClock
    settings: ClusterSettings

    def coordinator(self, name: str = "first") -> Coordinator:
        """A coordinator that leads."""
        made = Coordinator(name, self.broker, self.settings, Path("/nowhere"), NoTransitions())
        epoch = Cluster(self.broker).lead(name, expiry_s=3.0)
        assert epoch is not None
        made.epoch = epoch
        return made

    def successor(self) -> Coordinator:
        """Another one, after the first has died."""
        self.broker.client.delete(self.broker.keys.leader)
        return self.coordinator("second")

    def register(self, worker: str, slot: str = "") -> None:
        """A worker process is there."""
        about = {"slot": slot or worker, "registered_at": self.clock.now(), "address": f"memory:{worker}"}
        Cluster(self.broker).register(worker, about, expiry_s=3600)

    def die(self, worker: str) -> None:
        """Its heartbeat has expired."""
        self.broker.client.delete(self.broker.keys.alive(worker))

    def report_ready(self) -> None:
        """Every placed stage says that it is ready."""
        cluster = Cluster(self.broker)
        for node, fields in enumerate(cluster.nodes(self.settings.nodes)):
            for stage in range(self.settings.stages):
                cluster.stage_ready(
                    fields[f"stage:{stage}"],
                    node=node,
                    stage=stage,
                    epoch=int(fields["epoch"]),
                    training=BASE_VERSION,
                    versions=["0.0"],
                    layers=[0, 1],
                    memory_bytes=1,
                )

    def hosts(self) -> list[list[str]]:
        """Who hosts what."""
        nodes = Cluster(self.broker).nodes(self.settings.nodes)
        return [[node[f"stage:{stage}"] for stage in range(self.settings.stages)] for node in nodes]

    def submit(self, item: str, kind: str = "generate", **fields: object) -> None:
        """Submit an item of three tokens."""
        about = {"kind": kind, "tokens": 3, "reference_tokens": 1, "client": "me", "run": MAIN_RUN}
        Items(self.broker).submit(item, about | fields, {"prompt": [1, 2], "reference": [3]})

    def item(self, name: str) -> dict[str, str]:
        """An item's hash."""
        return self.broker.hash(self.broker.keys.item(name))

    def work(self, node: int) -> list[str]:
        """Items in a node's stream."""
        return [entry.fields["item"] for entry in Items(self.broker).work_of(node)]


@pytest.fixture
def clock(broker: Broker) -> ManualClock:
    """The cluster's time; it starts late enough for stream ids to be in the past."""
    broker.clock = clock = ManualClock(time=broker.clock.now())
    return clock


@pytest.fixture
def new_scene(broker: Broker, clock: ManualClock) -> Callable[..., Scene]:
    """Makes a cluster with settings of its own."""

    def make(**changes: object) -> Scene:
        shape = {"model": "m", "nodes": NODES, "stages": STAGES, "step_examples": 2} | changes
        settings = ClusterSettings(**shape)  # type: ignore[arg-type]
        Cluster(broker).create(settings, MODEL, BYTES_TOKENIZER)
        return Scene(broker, clock, settings)

    return make


@pytest.fixture
def scene(new_scene: Callable[..., Scene]) -> Scene:
    """Two nodes of two stages."""
    return new_scene()


@pytest.fixture
def ready(scene: Scene) -> tuple[Scene, Coordinator]:
    """The same, placed and ready."""
    coordinator = scene.coordinator()
    for index in range(NODES * STAGES):
        scene.register(f"w{index}")
    coordinator.tick()
    scene.report_ready()
    coordinator.tick()
    return scene, coordinator


# ----------------------------------------------------------------------------------------------------- placement
def test_workers_are_placed_when_all_are_there(scene: Scene) -> None:
    """Stages wait until every promised worker has registered, then each gets one."""
    coordinator = scene.coordinator()
    for index in range(3):
        scene.register(f"w{index}")
        coordinator.tick()
    assert not any("epoch" in node for node in Cluster(scene.broker).nodes(NODES))
    scene.register("w3")
    coordinator.tick()
    assert sorted(worker for node in scene.hosts() for worker in node) == ["w0", "w1", "w2", "w3"]


def test_only_the_lost_workers_node_starts_afresh(ready: tuple[Scene, Coordinator]) -> None:
    """A dead worker's place is empty until its successor registers; the other node keeps its epoch."""
    scene, coordinator = ready
    (_, keeps), before = scene.hosts(), Cluster(scene.broker).nodes(NODES)
    scene.clock.sleep(10)
    scene.die("w1")
    coordinator.tick()
    assert scene.hosts()[0].count("") == 1
    scene.register("w1-again", slot="w1")
    coordinator.tick()
    assert sorted(scene.hosts()[0]) == ["w0", "w1-again"]
    assert scene.hosts()[1] == keeps
    assert Cluster(scene.broker).nodes(NODES)[1] == before[1]


def test_heartbeats_are_not_trusted_at_first(ready: tuple[Scene, Coordinator]) -> None:
    """A new leader gives every worker the time to beat again before it calls one dead."""
    scene, _ = ready
    hosts = scene.hosts()
    scene.die("w1")
    coordinator = scene.successor()
    coordinator.tick()
    assert scene.hosts() == hosts
    scene.clock.sleep(scene.settings.heartbeat_expiry_s)
    coordinator.tick()
    assert scene.hosts() != hosts


def test_a_broken_link_is_not_forgotten_with_its_leader(ready: tuple[Scene, Coordinator]) -> None:
    """A link lost while nobody leads renews its node's placement as soon as somebody does."""
    scene, _ = ready
    epoch = int(Cluster(scene.broker).nodes(NODES)[0]["epoch"])
    Cluster(scene.broker).link_lost(0, epoch, "w1")
    hosts = scene.hosts()
    scene.successor().tick()
    assert int(Cluster(scene.broker).nodes(NODES)[0]["epoch"]) > epoch
    assert scene.hosts() == hosts


def test_a_broken_link_renews_a_placement_once(ready: tuple[Scene, Coordinator]) -> None:
    """Both ends may report it, late too: one new epoch."""
    scene, coordinator = ready
    epoch = int(Cluster(scene.broker).nodes(NODES)[0]["epoch"])
    for _ in range(3):
        Cluster(scene.broker).link_lost(0, epoch, "w1")
        coordinator.tick()
    renewed = int(Cluster(scene.broker).nodes(NODES)[0]["epoch"])
    coordinator.tick()
    assert int(Cluster(scene.broker).nodes(NODES)[0]["epoch"]) == renewed
    assert renewed == 1 + max(epoch, int(Cluster(scene.broker).nodes(NODES)[1]["epoch"]))


# ----------------------------------------------------------------------------------------------------------- items
def test_items_go_to_ready_nodes_in_turn(ready: tuple[Scene, Coordinator]) -> None:
    """naive-mix deals them out."""
    scene, coordinator = ready
    for item in "abcd":
        scene.submit(item)
    coordinator.tick()
    assert (scene.work(0), scene.work(1)) == (["a", "c"], ["b", "d"])
    assert {scene.item(item)["state"] for item in "abcd"} == {"dispatched"}
    assert scene.broker.client.xlen(scene.broker.keys.submissions) == 0


def test_items_wait_for_a_ready_node(scene: Scene) -> None:
    """What is submitted before anything is ready stays in the queue, and goes on when something is."""
    coordinator = scene.coordinator()
    scene.submit("a")
    coordinator.tick()
    assert scene.item("a")["state"] == "queued"
    for index in range(NODES * STAGES):
        scene.register(f"w{index}")
    coordinator.tick()
    scene.report_ready()
    coordinator.tick()
    assert scene.item("a")["state"] == "dispatched"


def test_what_an_earlier_leader_had_read_is_dispatched(ready: tuple[Scene, Coordinator]) -> None:
    """Submissions that were read by a leader that then paused, or whose reply was lost, aren't stranded."""
    scene, coordinator = ready
    coordinator.tick()
    scene.submit("a")
    stream = scene.broker.keys.submissions
    assert scene.broker.client.xreadgroup(COORDINATORS, "coordinator", {stream: ">"})
    coordinator.tick()
    scene.clock.sleep(2.0)
    coordinator.tick()
    assert scene.item("a")["state"] == "dispatched"


def test_a_new_leader_that_finds_no_node_ready_forgets_nothing(
    ready: tuple[Scene, Coordinator],
) -> None:
    """It dispatches what its predecessor had read as soon as a node is ready."""
    scene, _ = ready
    scene.submit("a")
    stream = scene.broker.keys.submissions
    assert scene.broker.client.xreadgroup(COORDINATORS, "coordinator", {stream: ">"})
    for node, fields in enumerate(Cluster(scene.broker).nodes(NODES)):
        scene.broker.client.hdel(scene.broker.keys.node(node), "ready:0")
        assert fields
    coordinator = scene.successor()
    coordinator.tick()
    assert scene.item("a")["state"] == "queued"
    scene.report_ready()
    scene.clock.sleep(2.0)
    coordinator.tick()
    assert scene.item("a")["state"] == "dispatched"


def test_a_lost_nodes_items_go_on(ready: tuple[Scene, Coordinator]) -> None:
    """Those in work and those waiting for a node that lost a stage go to the other one, each with a new attempt."""
    scene, coordinator = ready
    for item in "abcd":
        scene.submit(item)
    coordinator.tick()
    node = Cluster(scene.broker).nodes(NODES)[0]
    consumer = f"{node['stage:0']}:{node['epoch']}"
    (entry,) = scene.broker.read_group(scene.broker.keys.work(0), STAGE_0, consumer, block_s=0.001, count=1)
    Items(scene.broker).start(0, node["stage:0"], [entry])
    scene.clock.sleep(10)
    scene.die(node["stage:1"])
    coordinator.tick()
    coordinator.tick()
    assert (scene.work(0), sorted(scene.work(1))) == ([], ["a", "b", "c", "d"])
    assert {item: scene.item(item)["attempt"] for item in "abcd"} == {"a": "2", "b": "1", "c": "2", "d": "1"}
    assert scene.broker.client.xpending(scene.broker.keys.work(0), STAGE_0)["pending"] == 0


def test_a_living_items_lease_never_runs_out(ready: tuple[Scene, Coordinator]) -> None:
    """An item in work for hours is nobody else's as long as its worker lives."""
    scene, coordinator = ready
    scene.submit("a")
    coordinator.tick()
    node = Cluster(scene.broker).nodes(NODES)[0]
    consumer = f"{node['stage:0']}:{node['epoch']}"
    (entry,) = scene.broker.read_group(scene.broker.keys.work(0), STAGE_0, consumer, block_s=0.001, count=1)
    Items(scene.broker).start(0, node["stage:0"], [entry])
    for _ in range(3):
        scene.clock.sleep(3600)
        coordinator.tick()
    assert scene.item("a")["attempt"] == "1"


def test_an_item_that_kills_is_given_up(new_scene: Callable[..., Scene]) -> None:
    """Started ``max_deliveries`` times in vain, an item fails, and the dead letters name it and why."""
    scene = new_scene(nodes=1, stages=1, max_deliveries=2)
    coordinator = scene.coordinator()
    scene.submit("a")
    for turn in range(2):
        scene.register(f"w{turn}", slot="w")
        coordinator.tick()
        scene.report_ready()
        coordinator.tick()
        coordinator.tick()
        node = Cluster(scene.broker).nodes(1)[0]
        consumer = f"{node['stage:0']}:{node['epoch']}"
        entries = scene.broker.read_group(
            scene.broker.keys.work(0), STAGE_0, consumer, block_s=0.001, count=1
        )
        assert len(Items(scene.broker).start(0, node["stage:0"], entries)[0]) == 1
        scene.clock.sleep(10)
        scene.die(f"w{turn}")
        coordinator.tick()
    coordinator.tick()
    assert scene.item("a")["state"] == "failed"
    assert "2 deliveries" in scene.item("a")["reason"]
    letters: Any = scene.broker.client.xrange(scene.broker.keys.dead_letters)
    ((_, letter),) = letters
    assert letter["item"] == "a"
    assert scene.work(0) == []


def test_a_deadline_is_kept_to_a_turn_of_the_loop(ready: tuple[Scene, Coordinator]) -> None:
    """An item that hasn't ended by then fails; one that is queued for want of a node too, and one without goes on."""
    scene, coordinator = ready
    scene.submit("a", deadline_at=scene.clock.now() + 5.0)
    scene.submit("b")
    coordinator.tick()
    for node in range(NODES):
        scene.broker.client.hdel(scene.broker.keys.node(node), "ready:0")
    scene.submit("c", deadline_at=scene.clock.now() + 5.0)
    scene.clock.sleep(4.9)
    coordinator.tick()
    assert [scene.item(item)["state"] for item in "abc"] == ["dispatched", "dispatched", "queued"]
    scene.clock.sleep(0.2)
    for _ in range(2):
        coordinator.tick()
    assert [scene.item(item).get("reason") for item in "abc"] == [
        "deadline passed while dispatched",
        None,
        "deadline passed while queued",
    ]
    scene.report_ready()
    scene.clock.sleep(2.0)
    coordinator.tick()
    coordinator.tick()
    assert scene.broker.client.xlen(scene.broker.keys.submissions) == 0
    assert scene.broker.hash(scene.broker.keys.totals)["failed"] == "2"


def test_an_overdue_example_is_in_no_step(ready: tuple[Scene, Coordinator]) -> None:
    """It fails while it waits for others to fill its step; these make a step without it."""
    scene, coordinator = ready
    scene.submit("a", "train", deadline_at=scene.clock.now() + 5.0)
    coordinator.tick()
    scene.clock.sleep(6.0)
    coordinator.tick()
    for item in "bc":
        scene.submit(item, "train")
    coordinator.tick()
    training = Training(scene.broker, MAIN_RUN)
    assert scene.item("a")["reason"] == "deadline passed while queued"
    assert (training.step(1).items, training.state().planned) == (("b", "c"), 1)


def test_what_ends_with_its_client_is_cancelled_when_that_is_gone(ready: tuple[Scene, Coordinator]) -> None:
    """Not while it lives, and nothing else of that client."""
    scene, coordinator = ready
    scene.submit("bound", while_connected=1)
    scene.submit("free")
    scene.clock.sleep(60.0)
    coordinator.tick()
    assert scene.item("bound")["state"] == "dispatched"
    scene.broker.client.delete(scene.broker.keys.client_alive("me"))
    scene.clock.sleep(2.0)
    for _ in range(2):
        coordinator.tick()
    assert [scene.item(item)["state"] for item in ("bound", "free")] == ["cancelled", "dispatched"]
    assert scene.broker.hash(scene.broker.keys.totals)["cancelled"] == "1"


@pytest.mark.parametrize("because", ["a new leader", "an outage"])
def test_clients_have_the_time_to_be_heard_again(ready: tuple[Scene, Coordinator], because: str) -> None:
    """Right after its start, or an outage of the broker, the coordinator takes no silent client for gone."""
    scene, coordinator = ready
    scene.submit("bound", while_connected=1)
    scene.clock.sleep(60.0)
    coordinator.tick()
    scene.broker.client.delete(scene.broker.keys.client_alive("me"))
    if because == "a new leader":
        coordinator = scene.successor()
    else:
        scene.broker.outages += 1
    for _ in range(2):
        coordinator.tick()
        assert scene.item("bound")["state"] == "dispatched"
        scene.clock.sleep(scene.settings.client_expiry_s - 2.0)
    Items(scene.broker).still_here("me")
    coordinator.tick()
    assert scene.item("bound")["state"] == "dispatched"
    scene.broker.client.delete(scene.broker.keys.client_alive("me"))
    scene.clock.sleep(2.0)
    coordinator.tick()
    assert scene.item("bound")["state"] == "cancelled"


def test_an_older_leader_changes_nothing(ready: tuple[Scene, Coordinator]) -> None:
    """One that was paused while another took the lead is fenced at its first call."""
    scene, paused = ready
    scene.successor()
    scene.submit("a")
    with pytest.raises(Fenced):
        paused.tick()
    assert scene.item("a")["state"] == "queued"


# -------------------------------------------------------------------------------------------------------- training
def test_steps_are_planned_in_submission_order(ready: tuple[Scene, Coordinator]) -> None:
    """Full steps only, until a flush; a cancelled example is in none."""
    scene, coordinator = ready
    training = Training(scene.broker, MAIN_RUN)
    for item in "abcde":
        scene.submit(item, "train")
    assert Items(scene.broker).cancel("b")
    coordinator.tick()
    assert [training.step(step).items for step in (1, 2)] == [("a", "c"), ("d", "e")]
    scene.submit("f", "train")
    coordinator.tick()
    assert training.state().planned == 2
    training.flush()
    coordinator.tick()
    assert training.step(3).items == ("f",)
    assert training.queued_examples(10) == []


def test_a_partial_step_is_planned_after_the_time_that_was_set(new_scene: Callable[..., Scene]) -> None:
    """With ``max_step_wait_s`` the oldest example waits no longer than that."""
    scene = new_scene(max_step_wait_s=5.0)
    coordinator = scene.coordinator()
    scene.submit("a", "train")
    coordinator.tick()
    assert Training(scene.broker, MAIN_RUN).state().planned == 0
    scene.clock.sleep(6)
    coordinator.tick()
    assert Training(scene.broker, MAIN_RUN).step(1).items == ("a",)


def test_a_draining_version_has_its_time(ready: tuple[Scene, Coordinator]) -> None:
    """From when another took its place; where a rollback waits, it is cleared then, by one notice."""
    scene, coordinator = ready
    client, keys = scene.broker.client, scene.broker.keys
    client.hset(keys.versions, mapping={"served": "0.1", "draining": "0.0"})
    client.hset(keys.version("0.1"), mapping={"directory": "", "published_at": scene.clock.now()})
    client.hset(keys.versions_in_flight, "0.0", 1)
    Rollbacks(scene.broker, MAIN_RUN).open("r", BASE_VERSION)

    def cleared_after(seconds: float) -> list[str]:
        scene.clock.sleep(seconds)
        coordinator.tick()
        notices: Any = client.xrange(keys.control)
        return [fields["version"] for _, fields in notices if fields["type"] == "VersionCleared"]

    assert cleared_after(scene.settings.max_drain_s - 1) == []
    assert cleared_after(2) == ["0.0"]
    assert cleared_after(1) == ["0.0"]


def test_a_step_starts_on_every_ready_node_once(ready: tuple[Scene, Coordinator]) -> None:
    """All nodes are members; while the attempt lives no second one begins, after a loss another one does."""
    scene, coordinator = ready
    for item in "ab":
        scene.submit(item, "train")
    for _ in range(3):
        coordinator.tick()
    run = Training(scene.broker, MAIN_RUN).state()
    assert (run.attempt, run.attempt_step, run.members) == (1, 1, (0, 1))
    scene.clock.sleep(10)
    scene.die("w0")
    for _ in range(3):
        coordinator.tick()
    run = Training(scene.broker, MAIN_RUN).state()
    assert (run.attempt, run.attempt_step, len(run.members)) == (2, 1, 1)


class Holding:
    """A policy that gives requests to node 1 and wants no step to run."""

    name = "holding"
    uses_state = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """Requests only."""
        del state, now
        return Decision(node=None if work.is_training else 1)

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """Never."""
        del state, waiting, now
        return Resize()


def follow(coordinator: Coordinator, policy: Policy) -> None:
    """Have a coordinator ask this policy."""
    coordinator.scheduler.choose = lambda _settings, _slo_s: policy
    coordinator.scheduler.policy = policy


def test_a_step_is_held_back_for_a_bounded_time(ready: tuple[Scene, Coordinator]) -> None:
    """A policy that never lets training run delays a step by two seconds, and no request."""
    scene, coordinator = ready
    follow(coordinator, Holding())
    scene.submit("a")
    for item in "bc":
        scene.submit(item, "train")
    for _ in range(3):
        coordinator.tick()
    training = Training(scene.broker, MAIN_RUN)
    assert scene.work(1) == ["a"]
    assert (training.state().planned, training.state().attempt) == (1, 0)
    scene.clock.sleep(2.5)
    coordinator.tick()
    assert (training.state().attempt, training.state().attempt_step) == (1, 1)


def test_a_step_that_runs_counts_as_work_on_its_node(ready: tuple[Scene, Coordinator]) -> None:
    """Turn after turn: the shortest queue is another one's."""
    scene, coordinator = ready
    follow(coordinator, make_policy("jsq", PolicyOptions()))
    for item in "bc":
        scene.submit(item, "train")
    for _ in range(4):
        coordinator.tick()
    assert Training(scene.broker, MAIN_RUN).state().attempt == 1
    assert coordinator.scheduler.live is not None
    assert sum(coordinator.scheduler.live.cluster.unfinished_N) > 0


def test_a_policy_that_fails_is_overruled(ready: tuple[Scene, Coordinator]) -> None:
    """Requests go to the ready nodes in turn."""
    scene, coordinator = ready

    class Failing(Holding):
        def place(self, state: ClusterState, work: Work, now: float) -> Decision:
            del state, work, now
            raise ZeroDivisionError

    follow(coordinator, Failing())
    for item in "ab":
        scene.submit(item)
    coordinator.tick()
    assert [scene.work(0), scene.work(1)] == [["a"], ["b"]]


def test_a_request_without_a_node_waits_and_is_asked_about_again(ready: tuple[Scene, Coordinator]) -> None:
    """In the queue, from which it can still be taken; a new leader finds it there."""
    scene, coordinator = ready

    class Choosy(Holding):
        def place(self, state: ClusterState, work: Work, now: float) -> Decision:
            del state, work, now
            return Decision(node=None)

    follow(coordinator, Choosy())
    for item in "ab":
        scene.submit(item)
    coordinator.tick()
    assert [scene.item(item)["state"] for item in "ab"] == ["queued", "queued"]
    assert Items(scene.broker).cancel("b")
    scene.clock.sleep(5.0)
    coordinator.tick()
    assert [scene.work(0), scene.work(1)] == [[], []]
    successor = scene.successor()
    successor.tick()
    successor.tick()
    assert scene.work(0) + scene.work(1) == ["a"]
    assert scene.broker.client.xlen(scene.broker.keys.submissions) == 0
