"""Whoever dies while a cluster goes back to an earlier version: it gets there, and nothing is lost or done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters import COORDINATOR, fresh_broker
from lemix_common.clock import wait_until
from lemix_common.ids import Version
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.versions import Versions
from mortality import KillPoint
from rollback_scene import arm, learning

QUICK = {
    KillPoint("begin_rollback", "after"),
    KillPoint("version_prepared", "before"),
}
"""These run everywhere; all others with the slow tests."""
POINTS = [
    pytest.param(who, point, marks=[] if point in QUICK else [pytest.mark.slow], id=f"{who}-{point}")
    for who, calls in {
        COORDINATOR: ("begin_rollback", "publish_version", "load_training", "start_step"),
        "worker-0": ("version_prepared", "training_at", "gradients_ready"),
    }.items()
    for call in calls
    for when in ("before", "after")
    for point in [KillPoint(call, when)]
]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 of two steps, and two others upon them."""
    with (
        fresh_broker(server) as broker,
        learning(broker, folder, tmp_path_factory.mktemp("straight")) as straight,
    ):
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
        wait_until(
            lambda: back.cluster.replace_dead() == [] and versions.operation("r")["state"] != "requested",
            what="it has begun, so nothing is committed before its end",
            timeout_s=20,
        )
        assert [trained.step for trained in back.learn("after", 2)] == [4, 4, 5, 5]
        assert back.cluster.ended, "the kill point was never reached"
        assert (versions.operation("r")["state"], versions.operation("r")["version"]) == ("published", "1.3")
        assert back.served_sha256() == back.cluster.fingerprint(0) == undisturbed
        totals = broker.hash(broker.keys.totals)
        assert (totals["done"], totals["open"]) == ("10", "0")
