"""A whole cluster inside one process: real coordinator, workers and client code, each on threads of its own.

Transports are the in-memory ones, operations run inline. What only processes can show (SIGKILL, sockets, Celery) is
tested with `lemix up` in `tests/faults` and `tests/integration/test_up.py`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lemix import Client
from lemix.connection import connection_over
from lemix.model_folder import open_model_folder
from lemix_common.broker import Broker
from lemix_common.clock import SystemClock, wait_until
from lemix_common.ids import WorkerId
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from lemix_common.transports import Identity, open_transport
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.operations.transitions import advance, remove
from lemix_stage_worker.heartbeat import Heartbeat
from lemix_stage_worker.inbox import Inbox
from lemix_stage_worker.links import Links
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.reporter import Reporter
from lemix_stage_worker.worker import Worker


@dataclass
class InlineTransitions:
    """`Transitions` made at once, in the coordinator's own thread."""

    versions: Versions
    data_dir: Path

    def advance(self, operation: str) -> None:
        """Make the transition."""
        advance(self.versions, operation)

    def remove(self, version: str, directory: str) -> None:
        """Remove the files."""
        assert version
        remove(directory, root=self.data_dir / "versions")


@dataclass
class Hosted:
    """One worker and the threads it runs on."""

    worker: Worker
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def end(self) -> None:
        """Stop it as SIGTERM would."""
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=20.0)
            assert not thread.is_alive(), thread.name


@dataclass
class InProcessCluster:
    """What a test may look at and break."""

    broker: Broker
    settings: ClusterSettings
    data_dir: Path
    workers: dict[str, Hosted] = field(default_factory=dict)

    def add_worker(self, slot: str) -> Hosted:
        """Start a worker in a slot."""
        cluster = Cluster(self.broker)
        name = WorkerId(f"{slot}-{uuid.uuid4().hex[:6]}")
        inbox, clock = Inbox(), SystemClock()
        source = open_model(Path(self.settings.model))
        links = Links(name, open_transport(Identity(name, cluster.secret())), inbox, clock)
        address = links.listen(f"memory:{name}")
        worker = Worker(
            name=name,
            broker=self.broker,
            settings=self.settings,
            source=source,
            layers=cut_model(source, self.settings.stages),
            links=links,
            inbox=inbox,
            reporter=Reporter(name, self.broker),
        )
        hosted = self.workers[slot] = Hosted(worker)
        about = {"slot": slot, "pid": 0, "address": address, "registered_at": f"{clock.now():.6f}"}
        expiry_s = self.settings.heartbeat_expiry_s
        heartbeat = Heartbeat(worker, cluster, lambda: cluster.register(name, about, expiry_s=expiry_s), expiry_s)
        running = threading.Thread(target=worker.run, args=(hosted.stop,), name=f"compute-{name}", daemon=True)
        hosted.threads = [heartbeat.start(hosted.stop), running]
        running.start()
        return hosted

    def is_ready(self) -> bool:
        """Whether every stage is."""
        nodes = Cluster(self.broker).nodes(self.settings.nodes)
        return all(
            node.get("epoch") and node.get(f"ready:{stage}") == node["epoch"]
            for node in nodes
            for stage in range(self.settings.stages)
        )

    def fingerprint(self, node: int) -> str:
        """The sha256 of a node's training weights."""
        operation = f"fingerprint-{uuid.uuid4().hex[:8]}"
        versions = Versions(self.broker)
        epoch = int(Cluster(self.broker).nodes(self.settings.nodes)[node]["epoch"])
        versions.open(
            operation,
            "fingerprint",
            run=MAIN_RUN,
            root=str(self.data_dir / "fingerprints"),
            writers=[node] * self.settings.stages,
            epochs=[epoch] * self.settings.stages,
        )
        wait_until(
            lambda: versions.operation(operation).get("state") == "sealed", what="fingerprint", timeout_s=20.0
        )
        return versions.operation(operation)["sha256"]


@contextmanager
def in_process_cluster(
    broker: Broker, settings: ClusterSettings, data_dir: Path
) -> Iterator[tuple[InProcessCluster, Client]]:
    """A ready cluster and a client of it; everything has ended on exit."""
    model = open_model_folder(settings.model, stages=settings.stages)
    Cluster(broker).create(settings, model.fields(), model.tokenizer)
    cluster = InProcessCluster(broker, settings, data_dir)
    coordinator = Coordinator(
        name=f"coordinator-{uuid.uuid4().hex[:6]}",
        broker=broker,
        settings=settings,
        data_dir=data_dir,
        transitions=InlineTransitions(Versions(broker), data_dir),
    )
    stop = threading.Event()
    leading = threading.Thread(target=coordinator.run, args=(stop,), name="coordinator", daemon=True)
    leading.start()
    try:
        for index in range(settings.num_workers):
            cluster.add_worker(f"worker-{index}")
        wait_until(cluster.is_ready, what="every stage is ready", timeout_s=30.0)
        with Client(connection=connection_over(broker)) as client:
            yield cluster, client
    finally:
        for hosted in cluster.workers.values():
            hosted.end()
        stop.set()
        leading.join(timeout=10.0)
        assert not leading.is_alive()


def committed(broker: Broker) -> int:
    """The step committed last."""
    return Training(broker, MAIN_RUN).state().committed
