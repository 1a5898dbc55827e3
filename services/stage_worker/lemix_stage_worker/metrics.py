"""What a stage worker shows Prometheus, and the sums behind it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lemix_common import metrics
from lemix_common.metrics import Sample
from lemix_stage_worker.ready_queue import CATEGORY

if TYPE_CHECKING:
    from lemix_stage_worker.worker import Worker


@dataclass
class StageTimes:
    """Seconds since the start; written by the compute loop, read by a scrape."""

    _busy_s: defaultdict[tuple[int, int, str], float] = field(default_factory=lambda: defaultdict(float))
    _blocked_s: defaultdict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, node: int, stage: int, kind: str, *, busy_s: float, blocked_s: float) -> None:
        """A piece of compute ended."""
        with self._lock:
            self._busy_s[node, stage, kind] += max(0.0, busy_s)
            self._blocked_s[node, stage] += blocked_s

    def samples(self, hosted: Iterable[tuple[int, int]]) -> list[Sample]:
        """The sums now; of stages that are ``hosted`` and have done nothing, zeros."""
        with self._lock:
            for node, stage in hosted:
                self._blocked_s.setdefault((node, stage), 0.0)
                for kind in CATEGORY.values():
                    self._busy_s.setdefault((node, stage, kind), 0.0)
            return [
                *(Sample(metrics.BUSY_TIME, seconds, at) for at, seconds in sorted(self._busy_s.items())),
                *(
                    Sample(metrics.STAGE_BLOCKED_TIME, seconds, at)
                    for at, seconds in sorted(self._blocked_s.items())
                ),
            ]


def worker_samples(worker: Worker) -> Iterator[Sample]:
    """Everything a worker says of itself and of the stages it hosts."""
    yield Sample(metrics.OUTAGES, worker.broker.outages)
    yield Sample(metrics.READY_STEPS, len(worker.ready))
    yield Sample(metrics.LONGEST_STEP, worker.longest_step_s)
    hosts = list(worker.hosting.stages.values())
    for host in hosts:
        yield Sample(metrics.STAGE_READY, host.is_ready, (host.node, host.stage))
        yield Sample(metrics.STAGE_WEIGHTS, host.memory_bytes, (host.node, host.stage))
    for node, requests in list(worker.serving.nodes.items()):
        batcher = requests.batcher
        yield Sample(metrics.KV_BLOCKS, batcher.pool.num_owned, (node, "owned"))
        yield Sample(metrics.KV_BLOCKS, batcher.pool.num_free, (node, "free"))
        yield Sample(metrics.NODE_REQUESTS, len(batcher.running), (node, "running"))
        yield Sample(metrics.NODE_REQUESTS, len(batcher.waiting), (node, "waiting"))
        yield Sample(metrics.PREEMPTIONS, batcher.num_preempted, (node,))
    yield from worker.reporter.times.samples((host.node, host.stage) for host in hosts)
