"""The worker's sign of life, from a thread that no long torch call can block, and the watch over its own loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from lemix_common.errors import BrokerUnreachable
from lemix_common.sign_of_life import SignOfLife
from lemix_common.store.cluster import Cluster
from lemix_stage_worker.worker import Worker

log = structlog.get_logger()

BEAT_S = 0.5
SLOWEST_STEP_S = 30.0
PATIENCE = 20
"""A step may take this many times the longest one so far (but at least `SLOWEST_STEP_S`) before the loop is stuck."""
STUCK = 70
"""Exit status of a worker that ended itself."""


@dataclass
class Heartbeat:
    """Beats for a worker with a connection of its own."""

    worker: Worker
    cluster: Cluster
    register: Callable[[], None]
    expiry_s: float
    sign_of_life: SignOfLife = field(default_factory=SignOfLife)

    def start(self, stop: threading.Event) -> threading.Thread:
        """Register and beat until told to stop."""
        self.register()
        thread = threading.Thread(target=self._run, args=(stop,), name="heartbeat", daemon=True)
        thread.start()
        return thread

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            self._watch()
            try:
                if not self._beat():
                    log.warning("registered_again", worker=self.worker.name)
                    self.register()
                self.sign_of_life.show()
            except BrokerUnreachable as error:
                log.error("no_heartbeat", reason=str(error))

    def _beat(self) -> bool:
        ways = self.worker.links.ways
        return self.cluster.beat(
            self.worker.name,
            self.worker.progress,
            expiry_s=self.expiry_s,
            memory_used_bytes=self.worker.memory_used_bytes,
            links=", ".join(f"{peer} {way}" for peer, way in sorted(ways.items())),
        )

    def _watch(self) -> None:
        since = self.worker.busy_since
        allowed_s = max(SLOWEST_STEP_S, PATIENCE * self.worker.longest_step_s)
        if since is not None and time.monotonic() - since > allowed_s:
            log.critical("compute_loop_stuck", seconds=time.monotonic() - since)
            os._exit(STUCK)
