"""Whoever dies with an iteration on its way, wherever it is: every item ends once, and who waited has lost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_scene import kv_bytes
from clusters import InProcessCluster, fresh_broker, in_process_cluster
from faults.scenario import Load, small_settings
from lemix import GenerateItem
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from mortality import FramePoint
from switch_scene import switching, write_subject

POINTS = {
    # planned and embedded, nobody else knows of it
    ("worker-0", FramePoint("RunForward", "unsent", 20)): False,
    ("worker-0", FramePoint("RunForward", "sent", 20)): False,
    # on its way to a later stage, or waiting in line there
    ("worker-1", FramePoint("RunForward", "arrived", 20)): False,
    # its rows are computed on a later stage, their keys written
    ("worker-1", FramePoint("RunForward", "unsent", 20)): True,
    ("worker-2", FramePoint("ForwardDone", "unsent", 20)): False,
    # its tokens are chosen, on their way
    ("worker-2", FramePoint("ForwardDone", "sent", 20)): False,
    # they are there, not yet reported
    ("worker-0", FramePoint("ForwardDone", "arrived", 20)): True,
    # items come and go
    ("worker-0", FramePoint("OpenItem", "unsent", 5)): False,
    ("worker-1", FramePoint("OpenItem", "arrived", 5)): False,
    ("worker-0", FramePoint("ReleaseItem", "sent", 3)): False,
    ("worker-2", FramePoint("ReleaseItem", "arrived", 3)): False,
}
"""And whether it runs everywhere, or with the slow tests. (Reported and not yet appended: see `test_lost_workers`.)"""


@pytest.mark.parametrize(
    ("who", "point"),
    [
        pytest.param(*at, marks=[] if is_quick else [pytest.mark.slow], id=f"{at[0]}-{at[1]}")
        for at, is_quick in POINTS.items()
    ],
)
def test_a_kill_around_an_iteration_loses_nothing(
    folder: Path, undisturbed: str, server: RunningBroker, tmp_path: Path, who: str, point: FramePoint
) -> None:
    """Its requests are computed again from the tokens that the broker has, each token once; training as ever."""
    settings = small_settings(folder, stages=3, max_running=6)
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, settings, tmp_path, {who: point}) as (cluster, client),
    ):
        load = Load(cluster, client)
        load.serve()
        load.train()
        load.settle()
        assert cluster.ended, "the kill point was never reached"
        load.check()
        assert cluster.fingerprint(0) == undisturbed


def test_waiting_in_line_counts_against_nobody(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its node is lost: what was never started has no delivery, and is done in the end."""
    subject = write_subject(tmp_path / "model")
    first = GenerateItem([3], 40, ignore_eos=True, item_id="first")
    with (
        fresh_broker(server) as broker,
        switching(broker, subject, tmp_path, monkeypatch, stages=2, max_running=1, max_deliveries=2) as scene,
    ):
        running = scene.hold(first, tokens=2)
        waiting = [
            scene.client.submit(GenerateItem([4, 5 + index], 4, ignore_eos=True)) for index in range(5)
        ]
        for tokens in (4, 6, 8):
            scene.holding.held.clear()
            scene.holding.after["first"] = tokens
            scene.cluster.replace_worker("worker-1")
            wait_until(lambda: "first" in scene.holding.held, what="the first one goes on", timeout_s=20)
            known = [broker.hash(broker.keys.item(future.item_id)) for future in waiting]
            started = ["started_at" in fields for fields in known]
            assert not all(started), "one at a time comes back before the first one does"
            assert [fields.get("deliveries") for fields in known] == [
                "1" if is_so else None for is_so in started
            ]
        assert len(scene.finish(running).tokens) == 40
        assert [len(future.result(20).tokens) for future in waiting] == [4] * 5


def test_waiting_for_memory_is_no_loss(folder: Path, server: RunningBroker, tmp_path: Path) -> None:
    """Requests that were started and have no blocks yet begin again with the others; all are done in the end."""
    settings = small_settings(folder, stages=2, max_running=6, kv_bytes=kv_bytes(folder, 2, 1.0))
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, settings, tmp_path) as (cluster, client),
    ):
        items = [GenerateItem([3 + index] * 20, 40, ignore_eos=True) for index in range(6)]
        futures = [client.submit(item) for item in items]
        wait_until(lambda: num_waiting(cluster) > 2, what="some wait for blocks", timeout_s=20)
        cluster.replace_worker("worker-1")
        wait_until(
            lambda: cluster.replace_dead() == [] and all(future.done() for future in futures),
            what="all have ended",
            timeout_s=40,
        )
        assert [len(future.result(0).tokens) for future in futures] == [40] * 6
        wait_until(cluster.has_forgotten_items, what="blocks and leases are free", timeout_s=5)


def num_waiting(cluster: InProcessCluster) -> int:
    """Requests without blocks."""
    workers = [hosted.worker for hosted in cluster.workers.values() if hosted.worker is not None]
    return sum(len(node.batcher.waiting) for worker in workers for node in worker.serving.nodes.values())
