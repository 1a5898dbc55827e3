"""A whole cluster inside one process: real coordinator, workers and client code, each on threads of its own.

Transports are the in-memory ones, operations run inline. What only processes can show (SIGKILL, sockets, Celery) is
tested with `lemix up` in `tests/faults` and `tests/integration/test_up.py`.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devices import on_test_device
from lemix import Client
from lemix.connection import connection_over
from lemix.held_out import read_held_out
from lemix.model_folder import open_model_folder
from lemix_common.broker import Broker, connect
from lemix_common.clock import SystemClock, wait_until
from lemix_common.ids import WorkerId
from lemix_common.machine import memory_limit_bytes
from lemix_common.messages import Frame
from lemix_common.profile_file import read_profile
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from lemix_common.transports import Identity, open_transport
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.operations.transitions import advance, remove
from lemix_stage_worker.device import choose_device
from lemix_stage_worker.emulated.emulation import Emulation
from lemix_stage_worker.emulated.worker import EmulatedWorker
from lemix_stage_worker.heartbeat import Heartbeat
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.inbox import FrameArrived, Inbox
from lemix_stage_worker.links import Links
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import dtype_named, open_model
from lemix_stage_worker.model.weights import open_weights
from lemix_stage_worker.reporter import Reporter
from lemix_stage_worker.worker import Worker
from mortality import FramePoint, Killed, KillPoint, MortalBroker, mortal, silent_deaths

COORDINATOR = "coordinator"
"""Whom a kill point is for, if not a worker's slot."""


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


class MortalWorker(Worker):
    """A worker whose compute loop ends with its broker's connection."""

    def turn(self, *, wait_s: float) -> None:
        """One turn, if it still lives."""
        assert isinstance(self.broker, MortalBroker)
        if self.broker.dead.is_set():
            raise Killed
        super().turn(wait_s=wait_s)

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage, if it lives until then."""
        self._reach(frame, "unsent")
        super().send(host, stage, frame, tensors)
        self._reach(frame, "sent")

    def _deliver(self, host: HostedStage, arrived: FrameArrived) -> None:
        self._reach(arrived.frame, "arrived")
        super()._deliver(host, arrived)

    def _reach(self, frame: Frame, when: str) -> None:
        assert isinstance(self.broker, MortalBroker)
        self.broker.at_frame(type(frame).__name__, when)

    def run(self, stop: threading.Event) -> None:
        """Compute until told to stop, or dead."""
        try:
            super().run(stop)
        except Exception:
            assert isinstance(self.broker, MortalBroker)
            if self.broker.dead.is_set():  # it stumbled over its own end
                raise Killed from None
            raise


class MortalEmulatedWorker(MortalWorker, EmulatedWorker):
    """The same of a worker that only waits."""


@dataclass
class Hosted:
    """A worker or coordinator and the threads it runs on."""

    broker: MortalBroker
    worker: Worker | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def end(self) -> None:
        """Stop it as SIGTERM would."""
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=20.0)
            assert not thread.is_alive(), thread.name

    def abandon(self) -> None:
        """End it as SIGKILL would: its connections are cut, nothing is said or finished."""
        self.broker.die()
        self.stop.set()  # for the threads that only wait
        if self.worker is not None:
            for puller in list(self.worker.hosting.pullers.values()):
                puller.stop()
            self.worker.reporter.close()
            self.worker.links.close()
            self.worker.background.close()
        self.end()

    @property
    def pulled(self) -> set[str]:
        """Entries of the work streams that this worker has in work."""
        assert self.worker is not None
        return {entry for puller in self.worker.hosting.pullers.values() for entry in puller._held}


@dataclass
class InProcessCluster:
    """What a test may look at and break."""

    broker: Broker
    settings: ClusterSettings
    data_dir: Path
    workers: dict[str, Hosted] = field(default_factory=dict)
    coordinators: list[Hosted] = field(default_factory=list)
    ended: list[Hosted] = field(default_factory=list)

    def add_coordinator(self, kill_point: KillPoint | FramePoint | None = None) -> Hosted:
        """Start a coordinator; it leads, or stands by while another does."""
        broker = mortal(self.broker, kill_point)
        coordinator = Coordinator(
            name=f"coordinator-{uuid.uuid4().hex[:6]}",
            broker=broker,
            settings=self.settings,
            data_dir=self.data_dir,
            transitions=InlineTransitions(Versions(broker), self.data_dir),
        )
        hosted = Hosted(broker)
        hosted.threads = [
            threading.Thread(target=coordinator.run, args=(hosted.stop,), name=coordinator.name, daemon=True)
        ]
        self.coordinators.append(hosted)
        hosted.threads[0].start()
        return hosted

    def replace_coordinator(self) -> Hosted:
        """Kill the coordinator, let its lease run out and start another."""
        self._bury(self.coordinators.pop())
        self.broker.client.delete(self.broker.keys.leader)
        return self.add_coordinator()

    def add_worker(self, slot: str, kill_point: KillPoint | FramePoint | None = None) -> Hosted:
        """Start a worker in a slot."""
        name = WorkerId(f"{slot}-{uuid.uuid4().hex[:6]}")
        broker, inbox, clock = mortal(self.broker, kill_point), Inbox(), SystemClock()
        cluster = Cluster(broker)
        device = choose_device(self.settings.device, slot)
        source = open_model(Path(self.settings.model), dtype=dtype_named(self.settings.dtype), device=device)
        links = Links(name, open_transport(Identity(name, cluster.secret())), inbox, clock)
        address = links.listen(f"memory:{name}")
        parts: dict[str, Any] = {
            "name": name,
            "broker": broker,
            "settings": self.settings,
            "source": source,
            "layers": cut_model(source, self.settings.stages),
            "links": links,
            "inbox": inbox,
            "reporter": Reporter(name, broker),
        }
        worker: MortalWorker
        if (profile := cluster.profile()) is not None and self.settings.emulated_profile:
            emulation = Emulation(profile=profile, vocab_size=source.vocab_size, eos_ids=source.eos_ids)
            worker = MortalEmulatedWorker(**parts, emulation=emulation)
        else:
            worker = MortalWorker(**parts)
        broker.on_death = lambda: _cut(links)
        hosted = self.workers[slot] = Hosted(broker, worker)
        about = {
            "slot": slot,
            "pid": 0,
            "address": address,
            "memory": memory_limit_bytes(),
            "registered_at": f"{clock.now():.6f}",
        }
        expiry_s = self.settings.heartbeat_expiry_s
        heartbeat = Heartbeat(
            worker, cluster, lambda: cluster.register(name, about, expiry_s=expiry_s), expiry_s
        )
        running = threading.Thread(
            target=worker.run, args=(hosted.stop,), name=f"compute-{name}", daemon=True
        )
        with contextlib.suppress(Killed):
            hosted.threads = [heartbeat.start(hosted.stop)]
        hosted.threads.append(running)
        running.start()
        return hosted

    def replace_worker(self, slot: str) -> Hosted:
        """Kill the worker of a slot and start another there."""
        self._bury(self.workers.pop(slot))
        return self.add_worker(slot)

    def replace_dead(self) -> list[str]:
        """What `lemix up` does: start again whatever has died; returns who that was."""
        died = [slot for slot, hosted in self.workers.items() if hosted.broker.dead.is_set()]
        for slot in died:
            self.replace_worker(slot)
        if self.coordinators and self.coordinators[-1].broker.dead.is_set():
            self.replace_coordinator()
            died.append(COORDINATOR)
        return died

    def end(self) -> None:
        """Stop everything, all at once."""
        everyone = (*self.workers.values(), *self.coordinators)
        for hosted in everyone:
            hosted.stop.set()
        for hosted in everyone:
            hosted.abandon() if hosted.broker.dead.is_set() else hosted.end()
        for hosted in (*everyone, *self.ended):
            hosted.broker.client.connection_pool.disconnect()

    def _bury(self, hosted: Hosted) -> None:
        hosted.abandon()
        self.ended.append(hosted)

    def is_ready(self) -> bool:
        """Whether every stage is, on a living worker."""
        nodes = Cluster(self.broker).nodes(self.settings.nodes)
        living = {hosted.worker.name for hosted in self.workers.values() if hosted.worker is not None}
        return all(
            node.get("epoch")
            and node.get(f"ready:{stage}") == node["epoch"]
            and node[f"stage:{stage}"] in living
            for node in nodes
            for stage in range(self.settings.stages)
        )

    def is_trained(self) -> bool:
        """Whether every training node's stages are at the committed step."""
        step = str(committed(self.broker))
        nodes = Cluster(self.broker).nodes(self.settings.nodes)
        return all(
            nodes[node].get(f"training:{stage}") == step
            for node in self.settings.training_nodes
            for stage in range(self.settings.stages)
        )

    def has_forgotten_items(self) -> bool:
        """Whether no worker holds a request, a block of its cache or a place of an item."""
        workers = [hosted.worker for hosted in self.workers.values() if hosted.worker is not None]
        return not any(
            [
                *(worker.serving.requests for worker in workers),
                *(host.opened for worker in workers for host in worker.hosting.stages.values()),
                *(node.batcher.in_flight for worker in workers for node in worker.serving.nodes.values()),
                *(
                    node.batcher.pool.num_owned
                    for worker in workers
                    for node in worker.serving.nodes.values()
                ),
                *(hosted.pulled for hosted in self.workers.values()),
            ]
        )

    def fingerprint(self, node: int) -> str:
        """The sha256 of a node's training weights."""
        return self._snapshot(node)["sha256"]

    def weights(self, node: int) -> dict[str, torch.Tensor]:
        """A node's training weights."""
        weights = open_weights(Path(self._snapshot(node)["directory"]))
        return weights.read(weights.specs)

    def _snapshot(self, node: int) -> dict[str, str]:
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
        return versions.operation(operation)


@contextmanager
def fresh_broker(server: RunningBroker) -> Iterator[Broker]:
    """A connection to a cluster's keys that nobody else has; they are gone on exit."""
    broker = connect(server.url, f"test-{uuid.uuid4().hex[:8]}", patience_s=20.0)
    yield broker
    for key in broker.client.scan_iter(match=f"{broker.keys.prefix}*", count=1000):
        broker.client.delete(key)
    broker.client.close()


@contextmanager
def in_process_cluster(
    broker: Broker,
    settings: ClusterSettings,
    data_dir: Path,
    kill_points: Mapping[str, KillPoint | FramePoint] | None = None,
) -> Iterator[tuple[InProcessCluster, Client]]:
    """A ready cluster and a client of it; everything has ended on exit.

    Who has a kill point (a worker's slot, or `COORDINATOR`) may be dead when this returns.
    """
    torch.set_num_threads(1)  # as a worker process does
    points, settings = kill_points or {}, on_test_device(settings)
    threads = set(threading.enumerate())
    model = open_model_folder(settings.model, stages=settings.stages)
    held_out = read_held_out(settings.gate_file, model)
    Cluster(broker).create(settings, model.fields(), model.tokenizer, held_out)
    if settings.emulated_profile:
        Cluster(broker).publish_profile(read_profile(Path(settings.emulated_profile)))
    cluster = InProcessCluster(broker, settings, data_dir)
    with silent_deaths():
        cluster.add_coordinator(points.get(COORDINATOR))
        try:
            for index in range(settings.num_workers):
                cluster.add_worker(f"worker-{index}", points.get(f"worker-{index}"))
            if not points:
                wait_until(cluster.is_ready, what="every stage is ready", timeout_s=30.0)
            with Client(connection=connection_over(broker)) as client:
                yield cluster, client
        finally:
            cluster.end()
            wait_until(
                lambda: not [thread for thread in threading.enumerate() if thread not in threads],
                what=f"the threads have ended, {set(threading.enumerate()) - threads}",
                timeout_s=10.0,
            )


def _cut(links: Links) -> None:
    """What the kernel does with the connections of a killed process."""
    for listener in links._listeners:
        listener.close()
    for channel in (*links._channels.values(), *links._incoming):
        channel.close()


def committed(broker: Broker) -> int:
    """The step committed last."""
    return Training(broker, MAIN_RUN).state().committed
