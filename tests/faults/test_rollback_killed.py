"""Whoever dies while a cluster goes back to an earlier version: it gets there, and nothing is lost or done twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import pytest

from clusters import COORDINATOR, InProcessCluster, fresh_broker
from lemix_common.clock import wait_until
from lemix_common.ids import Version
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.versions import Versions
from mortality import KillPoint, MortalBroker
from rollback_scene import learning

QUICK = {KillPoint("begin_rollback", "after"), KillPoint("publish_version", "after"), KillPoint("version_prepared", "before")}
"""These run everywhere; all others with the slow tests."""
POINTS = [
    pytest.param(who, point, marks=[] if point in QUICK else [pytest.mark.slow], id=f"{who}-{point}")
    for who, calls in {
        COORDINATOR: ("begin_rollback", "publish_version", "load_training", "start_step"),
        "worker-0": ("version_prepared", "training_at", "gradients_ready"),
    }.items()
    for call in calls
    for when in ("before", "after")
    for point in [KillPoint(call, when)]  # type: ignore[arg-type]
]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 of two steps, and two others upon them."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path_factory.mktemp("straight")) as straight:
        straight.learn("kept", 2)
        straight.learn("after", 2)
        return straight.cluster.fingerprint(0)


@pytest.mark.parametrize(("who", "point"), POINTS)
def test_a_kill_during_a_rollback_changes_nothing(
    folder: Path, server: RunningBroker, tmp_path: Path, undisturbed: str, who: str, point: KillPoint
) -> None:
    """Killed just before or after a call reached the broker: the same weights, each example learned once."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=2) as back:
        back.learn("kept", 2)
        back.checkpoint()
        back.learn("left", 1)
        arm(back.cluster, who, point)
        rollbacks, versions = Rollbacks(broker, MAIN_RUN), Versions(broker)
        rollbacks.open("r", Version(0, 2))
        futures = back.submit("after", 2)

        def is_over() -> bool:
            back.cluster.replace_dead()
            return versions.operation("r")["state"] == "published" and all(future.done() for future in futures)

        wait_until(is_over, what="it is gone back and learned on", timeout_s=30)
        assert back.cluster.ended, "the kill point was never reached"
        back.calm()
        assert [future.result(0).step for future in futures] in ([4, 4, 5, 5],)
        # a step may have been committed before the rollback began: then it was left with it
        began = int(versions.operation("r")["step"])
        assert began in (3, 4, 5)
        if began == 3:
            assert back.cluster.fingerprint(0) == undisturbed
        assert back.served_sha256() == back.cluster.fingerprint(0)
        totals = broker.hash(broker.keys.totals)
        assert (totals["done"], totals["open"]) == ("10", "0")


def arm(cluster: InProcessCluster, who: str, point: KillPoint) -> None:
    """Have it die at its next such call."""
    hosted = cluster.coordinators[-1] if who == COORDINATOR else cluster.workers[who]
    hosted.broker._calls.clear()
    hosted.broker.kill_point = point
