"""A long run of serving with training between: memory stays what it was."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batch_scene import kv_bytes
from clusters import InProcessCluster, fresh_broker, in_process_cluster
from lemix import Client, Future, GenerateItem, ScoreItem, TrainItem
from lemix_common.clock import wait_until
from lemix_common.errors import ItemCancelled
from lemix_common.sampling import GREEDY, Sampling
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from switch_scene import write_subject

STATM = Path("/proc/self/statm")
PAGE_BYTES = 4096
STEPS, WARM_UP, EVERY = 10_000, 3_000, 250
AT_A_TIME = 24
MOST_BYTES_A_STEP = 1000
"""By which memory may grow, on the slope of a line through what was measured: 1 MB in a thousand steps, which serve
about 130 requests and publish 5 versions."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Endless:
    """Requests of all kinds, as many at a time, and a training example for every few."""

    cluster: InProcessCluster
    client: Client
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    open: set[Future[Any]] = field(default_factory=set)
    num_ended: int = 0

    def run(self) -> Iterator[int]:
        """Keep it going; yields the number of iterations so far, again and again."""
        while True:
            while len(self.open) < AT_A_TIME:
                self.open.add(self.submit())
            done, _ = wait(self.open, timeout=20, return_when="FIRST_COMPLETED")
            for future in done:
                assert isinstance(future.exception(0), ItemCancelled | None)
            self.open -= done
            self.num_ended += len(done)
            yield self.num_iterations

    def submit(self) -> Future[Any]:
        """The next request; every eighth item is an example, every twentieth request is taken back."""
        draw = self.draw
        ids = [draw.randrange(3, 61) for _ in range(draw.randint(1, 60))]
        kind = draw.random()
        if kind < 0.125:
            return self.client.submit(TrainItem(ids, [5, 6, 7]))
        if kind < 0.2:
            return self.client.submit(ScoreItem(ids, [5, 6, 7]))
        sampling = draw.choice([GREEDY, Sampling(temperature=1.0, repetition_penalty=1.2, seed=3)])
        item = GenerateItem(ids, draw.randint(1, 48), sampling=sampling, on_update="rebuild", ignore_eos=True)
        future = self.client.submit(item)
        if kind > 0.95:
            self.client.cancel(future.item_id)
        return future

    @property
    def num_iterations(self) -> int:
        """Planned so far."""
        workers = [hosted.worker for hosted in self.cluster.workers.values() if hosted.worker is not None]
        return sum(node.batcher._next_number for worker in workers for node in worker.serving.nodes.values())


def rss_bytes() -> int:
    """What this process, with all of the cluster but its broker, holds now; what the heap keeps free is given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(STATM.read_text().split()[1]) * PAGE_BYTES


def slope(points: list[tuple[int, int]]) -> float:
    """Of the line through them with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def test_10000_mixed_steps_take_no_more_memory(server: RunningBroker, tmp_path: Path) -> None:
    """With cancels, pre-emptions, training steps and new versions: no growth, and at the end no block is owned."""
    if not STATM.exists():
        pytest.skip(f"{STATM} is not there")
    folder = write_subject(tmp_path / "model")
    settings = ClusterSettings(
        model=str(folder),
        stages=2,
        step_examples=4,
        checkpoint_every=50,
        learning_rate=1e-3,
        kv_bytes=kv_bytes(folder, 2, 4.0),
        result_ttl_s=5.0,
    )
    points: list[tuple[int, int]] = []
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, tmp_path) as (cluster, client):
        endless = Endless(cluster, client)
        for steps in endless.run():
            if steps >= WARM_UP and steps >= (points[-1][0] + EVERY if points else 0):
                points.append((steps, rss_bytes()))
            if steps >= STEPS:
                break
        for future in endless.open:
            future.cancel()
        client.flush(60)
        status = client.status()
        wait_until(cluster.has_forgotten_items, what="no block, place or iteration is left", timeout_s=20)
    growth = slope(points)
    print(
        f"{points[-1][0]} iterations, version {status['weights_version']}, {endless.num_ended} items ended: "
        f"{points[0][1] / 1e6:.1f} MB at step {points[0][0]}, {points[-1][1] / 1e6:.1f} MB at the end, "
        f"{growth * 1000 / 1e6:+.3f} MB in a thousand steps"
    )
    assert growth <= MOST_BYTES_A_STEP
