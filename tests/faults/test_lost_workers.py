"""Whoever dies, at whatever moment: every item ends once, and the weights are those of an undisturbed run.

The cluster is in this process; killed parts fall silent as after SIGKILL (see `mortality`) and are started again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import pytest
from _pytest.mark import ParameterSet
from torch import Tensor

from clusters import COORDINATOR, InProcessCluster, committed, fresh_broker, in_process_cluster
from faults.scenario import Load, notices, small_settings
from lemix_common.clock import wait_until
from lemix_common.messages import Frame
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import Cluster
from lemix_stage_worker import hosting
from lemix_stage_worker.hosted_stage import build_template
from lemix_stage_worker.hosting import Hosting
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageModel
from mortality import KillPoint, MortalBroker

Start = Callable[..., AbstractContextManager[tuple[InProcessCluster, Load]]]


@pytest.fixture
def start(folder: Path, server: RunningBroker, tmp_path: Path) -> Start:
    """Starts a cluster of the small model, with kill points or without."""

    @contextmanager
    def run(
        kill_points: Mapping[str, KillPoint] | None = None, **settings: object
    ) -> Iterator[tuple[InProcessCluster, Load]]:
        chosen = small_settings(folder, **settings)
        with (
            fresh_broker(server) as broker,
            in_process_cluster(broker, chosen, tmp_path, kill_points) as (cluster, client),
        ):
            yield cluster, Load(cluster, client)

    return run


def _fingerprints(cluster: InProcessCluster) -> set[str]:
    return {cluster.fingerprint(node) for node in range(cluster.settings.nodes)}


# ------------------------------------------------------------------------------------------------ at any moment
@pytest.mark.parametrize(
    ("nodes", "stages", "slot"),
    [
        pytest.param(1, 1, "worker-0", marks=pytest.mark.slow),
        (1, 2, "worker-0"),
        pytest.param(1, 2, "worker-1", marks=pytest.mark.slow),
        pytest.param(1, 3, "worker-1", marks=pytest.mark.slow),
        (2, 2, "worker-2"),
    ],
)
def test_a_killed_worker_loses_nothing(
    start: Start, undisturbed: str, nodes: int, stages: int, slot: str
) -> None:
    """Killed while it serves and trains: its items end once, its step is redone, the weights are the same."""
    with start(nodes=nodes, stages=stages) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 3, what="3 steps are committed", timeout_s=10)
        load.serve()
        cluster.replace_worker(slot)
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


def test_a_lone_node_comes_back_by_checkpoint_and_replay(start: Start, undisturbed: str) -> None:
    """With one node a lost stage's state is nowhere else: all stages load the checkpoint and replay what followed."""
    with start(stages=2, checkpoint_every=4) as (cluster, load):
        load.train()
        load.settle()
        step = int(cluster.broker.hash(cluster.broker.keys.run("main"))["checkpoint"])
        assert step in (4, 5)
        cluster.replace_worker("worker-1")
        load.settle()
        loads = notices(cluster.broker, "LoadTraining")
        assert [int(notice["step"]) for notice in loads] == [step]
        replayed = [
            int(notice["step"])
            for notice in notices(cluster.broker, "StepCommitted")
            if notice["replay"] == "1"
        ]
        assert replayed == list(range(step + 1, 7))
        assert _fingerprints(cluster) == {undisturbed}


def test_a_second_node_gives_its_state(start: Start, undisturbed: str) -> None:
    """With two nodes the lost state is copied from the living replica: nothing is replayed."""
    with start(nodes=2, stages=2, checkpoint_every=100) as (cluster, load):
        load.train()
        load.settle()
        cluster.replace_worker("worker-3")
        load.settle()
        assert [int(notice["step"]) for notice in notices(cluster.broker, "LoadTraining")] == [6]
        assert {notice["replay"] for notice in notices(cluster.broker, "StepCommitted")} == {"0"}
        assert _fingerprints(cluster) == {undisturbed}


def test_every_worker_at_once(start: Start, undisturbed: str) -> None:
    """All workers of two nodes killed in the same moment: the checkpoint and the plan bring everything back."""
    with start(nodes=2, stages=2) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 3, what="3 steps are committed", timeout_s=10)
        for hosted in cluster.workers.values():
            hosted.broker.die()
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


def test_workers_killed_one_after_the_other(start: Start, undisturbed: str) -> None:
    """A second worker dies while the first one's place is still being taken, and a third."""
    with start(nodes=1, stages=3) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 2, what="2 steps are committed", timeout_s=10)
        for slot in ("worker-0", "worker-1", "worker-2", "worker-0"):
            cluster.replace_worker(slot)
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


def test_a_living_worker_takes_over_where_none_comes(start: Start, undisturbed: str) -> None:
    """Without a fresh process a lost stage goes to a living worker after a while, which then hosts two."""
    with start(stages=2, takeover_after_s=0.3, heartbeat_expiry_s=1.0) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 2, what="2 steps are committed", timeout_s=10)
        cluster._bury(cluster.workers.pop("worker-0"))
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


def test_items_wait_for_a_stage_without_a_host(start: Start) -> None:
    """While nobody hosts a stage the node's items wait: none is failed, none is given up."""
    with start(stages=2, max_deliveries=2, heartbeat_expiry_s=1.0) as (cluster, load):
        load.serve(20)
        cluster._bury(cluster.workers.pop("worker-1"))

        def stage_0_is_alone() -> bool:
            (node,) = Cluster(cluster.broker).nodes(1)
            return node["stage:1"] == "" and node.get("ready:0") == node["epoch"]

        wait_until(stage_0_is_alone, what="stage 0 is ready, stage 1 has no host", timeout_s=10)
        load.serve(2)
        cluster.add_worker("worker-1")
        load.settle()
        load.check()


# ----------------------------------------------------------------------------------------- at inconvenient moments
def test_a_link_breaks_between_two_living_workers(start: Start, undisturbed: str) -> None:
    """What was on its way is lost: the node starts afresh, its items and its step are done again."""
    with start(stages=2) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 2, what="2 steps are committed", timeout_s=10)
        worker = cluster.workers["worker-0"].worker
        assert worker is not None
        for channel in list(worker.links._channels.values()):
            channel.close()
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


def test_a_link_breaks_while_nobody_leads(
    start: Start, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next coordinator finds it in the node's hash; until then nothing is computed on what was lost."""
    with start(stages=2) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 2, what="2 steps are committed", timeout_s=10)
        cluster.coordinators[-1].broker.die()
        worker = cluster.workers["worker-0"].worker
        assert worker is not None
        for channel in list(worker.links._channels.values()):
            channel.close()
        wait_until(lambda: notices(cluster.broker, "LinkLost") != [], what="the loss is noted", timeout_s=10)
        sent: list[int] = []
        send = worker.links.send

        def noted(peer: str, reach: str, frame: Frame, tensors: Sequence[Tensor] = ()) -> bool:
            sent.append(frame.epoch)
            return send(peer, reach, frame, tensors)

        monkeypatch.setattr(worker.links, "send", noted)
        load.settle()
        load.check()
        assert 1 not in sent, "of the placement whose link broke"
        assert _fingerprints(cluster) == {undisturbed}


def test_a_slow_worker_misses_no_placement(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placed between its registration and its first look at the notices, it still takes its place."""
    last_id = MortalBroker.last_id

    def late(broker: MortalBroker, stream: str) -> str:
        if threading.current_thread().name.startswith(("control", "compute")):
            wait_until(lambda: "epoch" in broker.hash(broker.keys.node(0)), what="placed", timeout_s=10)
        return last_id(broker, stream)

    monkeypatch.setattr(MortalBroker, "last_id", late)
    with start(stages=2) as (_, load):
        load.serve(1)
        load.settle()
        load.check()


def test_two_placements_at_once_build_a_stage_once(
    start: Start, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is known before the first one's stage is built: it isn't built, and reported, twice."""
    hash_, read = MortalBroker.hash, Hosting.read_placement
    reads: list[int] = []
    built: list[int] = []

    def read_placement(stages: Hosting, node: int) -> None:
        reads.append(node)
        read(stages, node)

    def slow_hash(broker: MortalBroker, key: str) -> dict[str, str]:
        value = hash_(broker, key)
        is_worker = threading.current_thread().name.startswith("background")
        if is_worker and key == broker.keys.node(0) and value.get("epoch") == "1":
            placements = len(reads)
            Cluster(broker).link_lost(0, 1, "nobody")
            wait_until(
                lambda: len(notices(broker, "PlacementChanged")) == 2,
                what="the second placement",
                timeout_s=10,
            )
            wait_until(lambda: len(reads) > placements, what="it is to be read", timeout_s=10)
        return value

    def counting_build(source: ModelSource, stage: int, layers: tuple[range, ...]) -> StageModel:
        built.append(stage)
        return build_template(source, stage, layers)

    monkeypatch.setattr(Hosting, "read_placement", read_placement)
    monkeypatch.setattr(MortalBroker, "hash", slow_hash)
    monkeypatch.setattr(hosting, "build_template", counting_build)
    with start(stages=1) as (running, load):
        assert built == [0]
        load.train()
        load.settle()
        load.check()
        assert _fingerprints(running) == {undisturbed}


# ------------------------------------------------------------------------------------------------- at every call
BEFORE_AND_AFTER: tuple[Literal["before", "after"], ...] = ("before", "after")
WORKER_CALLS = (
    "register_worker",
    "stage_ready",
    "start",
    "append_tokens",
    "complete",
    "gradients_ready",
    "shard_written",
    "version_prepared",
)
LATER = {"append_tokens": 25, "complete": 4, "gradients_ready": 3, "start": 2, "dispatch": 3, "start_step": 3}
COORDINATOR_CALLS = (
    "lead",
    "place_node",
    "plan_step",
    "dispatch",
    "start_step",
    "open_operation",
    "write_shards",
    "seal_snapshot",
    "prepare_version",
    "publish_version",
    "retire_version",
    "forget_steps",
)


QUICK = {
    KillPoint("append_tokens", "after", 25),
    KillPoint("complete", "before", 4),
    KillPoint("dispatch", "after", 3),
    KillPoint("gradients_ready", "after", 3),
    KillPoint("shard_written", "before"),
}
"""These run everywhere; all others with the slow tests."""


def _points(slot: str, calls: tuple[str, ...]) -> Iterator[ParameterSet]:
    for call in calls:
        for when in BEFORE_AND_AFTER:
            point = KillPoint(call, when, LATER.get(call, 1))
            marks = [] if point in QUICK else [pytest.mark.slow]
            yield pytest.param(slot, point, marks=marks, id=f"{slot}-{point}")


@pytest.mark.parametrize(
    ("who", "point"), [*_points("worker-0", WORKER_CALLS), *_points(COORDINATOR, COORDINATOR_CALLS)]
)
def test_a_kill_at_any_call_loses_nothing(start: Start, undisturbed: str, who: str, point: KillPoint) -> None:
    """Killed just before or after a call reached the broker: every item ends once, the same weights."""
    with start({who: point}, stages=2) as (cluster, load):
        load.train()
        load.serve()
        load.settle()
        assert cluster.ended, "the kill point was never reached"
        load.check()
        assert _fingerprints(cluster) == {undisturbed}


@pytest.mark.slow
@pytest.mark.parametrize("when", BEFORE_AND_AFTER)
@pytest.mark.parametrize("call", WORKER_CALLS)
def test_a_kill_on_one_of_two_nodes_loses_nothing(
    start: Start, undisturbed: str, call: str, when: Literal["before", "after"]
) -> None:
    """The same where another replica lives on."""
    with start({"worker-0": KillPoint(call, when, LATER.get(call, 1))}, nodes=2, stages=2) as (cluster, load):
        load.train()
        load.serve()
        load.settle()
        load.check()
        assert _fingerprints(cluster) == {undisturbed}
