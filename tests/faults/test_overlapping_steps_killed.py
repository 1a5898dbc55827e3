"""With a-pp two steps are in progress at a time, on weights one version old: a kill changes no bit of that either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from clusters import COORDINATOR, InProcessCluster, committed, fresh_broker, in_process_cluster
from faults.scenario import Load, notices, small_settings
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from mortality import KillPoint


@contextmanager
def late(
    folder: Path,
    server: RunningBroker,
    data_dir: Path,
    kill_points: Mapping[str, KillPoint] | None = None,
    **settings: object,
) -> Iterator[tuple[InProcessCluster, Load]]:
    """A cluster of two stages whose steps overlap."""
    chosen = small_settings(folder, **({"schedule": "a-pp", "stages": 2} | settings))
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, chosen, data_dir, kill_points) as (cluster, client),
    ):
        yield cluster, Load(cluster, client)


@pytest.fixture(scope="module")
def undisturbed_late(folder: Path, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 that training ends with when nothing happens."""
    with late(folder, server, tmp_path_factory.mktemp("late")) as (cluster, load):
        load.train()
        load.settle()
        load.check()
        overlapping = [int(notice["weights"]) for notice in notices(cluster.broker, "RunStep")]
        assert overlapping == [0, 0, 1, 2, 3, 4]
        return cluster.fingerprint(0)


@pytest.mark.parametrize("slot", [pytest.param("worker-0", marks=pytest.mark.slow), "worker-1"])
def test_a_killed_worker_loses_nothing(
    folder: Path, server: RunningBroker, tmp_path: Path, undisturbed_late: str, slot: str
) -> None:
    """Killed while two steps are in progress: both are done again, on the versions that they were planned on."""
    with late(folder, server, tmp_path) as (cluster, load):
        load.serve()
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 3, what="3 steps are committed", timeout_s=10)
        cluster.replace_worker(slot)
        load.settle()
        load.check()
        assert cluster.fingerprint(0) == undisturbed_late


def test_a_checkpoint_has_the_version_before(
    folder: Path, server: RunningBroker, tmp_path: Path, undisturbed_late: str
) -> None:
    """All stages are loaded from it, and the steps behind it replayed: the first needs weights older than it."""
    with late(folder, server, tmp_path, checkpoint_every=4) as (cluster, load):
        load.train()
        load.settle()
        cluster.replace_worker("worker-1")
        load.settle()
        (loaded,) = notices(cluster.broker, "LoadTraining")
        replayed = [
            (int(notice["step"]), int(notice["weights"]))
            for notice in notices(cluster.broker, "RunStep")
            if int(notice["step"]) > int(loaded["step"])
        ]
        assert replayed[-1] == (6, 4)
        assert cluster.fingerprint(0) == undisturbed_late


def test_two_nodes_learn_one_model(
    folder: Path, server: RunningBroker, tmp_path: Path, undisturbed_late: str
) -> None:
    """One is killed and takes the other's state, both versions of it."""
    with late(folder, server, tmp_path, nodes=2, stages=1) as (cluster, load):
        load.train()
        wait_until(lambda: committed(cluster.broker) >= 2, what="2 steps are committed", timeout_s=10)
        cluster.replace_worker("worker-1")
        load.settle()
        assert {cluster.fingerprint(node) for node in range(2)} == {undisturbed_late}


BEFORE_AND_AFTER: tuple[Literal["before", "after"], ...] = ("before", "after")
POINTS = [
    (who, KillPoint(call, when, count))
    for who, call, count in (
        ("worker-0", "gradients_ready", 3),
        ("worker-0", "shard_written", 1),
        (COORDINATOR, "start_step", 3),
        (COORDINATOR, "plan_step", 2),
        (COORDINATOR, "seal_snapshot", 1),
    )
    for when in BEFORE_AND_AFTER
]
QUICK = {KillPoint("gradients_ready", "after", 3)}


@pytest.mark.parametrize(
    ("who", "point"),
    [
        pytest.param(who, point, marks=[] if point in QUICK else [pytest.mark.slow], id=f"{who}-{point}")
        for who, point in POINTS
    ],
)
def test_a_kill_at_any_call_loses_nothing(
    folder: Path, server: RunningBroker, tmp_path: Path, undisturbed_late: str, who: str, point: KillPoint
) -> None:
    """Killed just before or after a call reached the broker: the same weights."""
    with late(folder, server, tmp_path, {who: point}) as (cluster, load):
        load.train()
        load.serve()
        load.settle()
        assert cluster.ended, "the kill point was never reached"
        load.check()
        assert cluster.fingerprint(0) == undisturbed_late
