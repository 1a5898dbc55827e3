"""Whoever dies while a version is judged: the verdict is the same, and each example is done once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusters import COORDINATOR, fresh_broker
from lemix import TrainItem
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.store.versions import Versions
from mortality import KillPoint
from rollback_scene import arm, learning

QUICK = {KillPoint("hold_back", "after")}
"""These run everywhere; all others with the slow tests."""
POINTS = [
    pytest.param(who, point, marks=[] if point in QUICK else [pytest.mark.slow], id=f"{who}-{point}")
    for who, calls in {
        COORDINATOR: ("submit", "advance_operation", "version_judged", "hold_back"),
        "worker-0": ("start", "complete", "version_prepared"),
    }.items()
    for call in calls
    for when in ("before", "after")
    for point in [KillPoint(call, when)]
]


@pytest.mark.parametrize(("who", "point"), POINTS)
def test_a_kill_while_a_version_is_judged_changes_nothing(
    folder: Path, server: RunningBroker, tmp_path: Path, who: str, point: KillPoint
) -> None:
    """Killed just before or after a call reached the broker: the bad version is held back once, the good one served."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "the cat sat on", "reference": "the mat"}) + "\n", "utf-8")
    about = {"stages": 2, "gate_file": str(held_out), "learning_rate": 0.05}
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path / "data", **about) as running:
        versions, client = Versions(broker), running.client
        learned = [client.submit(TrainItem("the cat sat on", "the mat")) for _ in range(6)]
        wait_until(lambda: all(future.done() for future in learned), what="the good is learned", timeout_s=30)
        running.calm()
        arm(running.cluster, who, point)
        learned += [client.submit(TrainItem("the cat sat on", "hill then")) for _ in range(2)]

        def is_judged() -> bool:
            is_over = running.cluster.replace_dead() == [] and not versions.in_progress()
            return is_over and versions.published(1)[0]["version"] == "0.4"

        wait_until(is_judged, what="the bad one is judged", timeout_s=30)
        assert running.cluster.ended, "the kill point was never reached"
        assert [v["verdict"] for v in versions.published(9) if v["version"] == "0.4"] == ["held back"]
        assert versions.live()["served"] == "0.3"
        while not all(future.done() for future in learned):
            step = int(versions.published(1)[0]["step"])
            learned += [client.submit(TrainItem("the cat sat on", "the mat")) for _ in range(2)]
            wait_until(
                lambda step=step: int(versions.published(1)[0]["step"]) > step,  # type: ignore[misc]
                what="the next one is judged",
                timeout_s=30,
            )
            wait_until(lambda: not versions.in_progress(), what="nothing goes on", timeout_s=30)
        totals = broker.hash(broker.keys.totals)
        assert (totals["open"], totals["submitted"]) == ("0", totals["done"])
