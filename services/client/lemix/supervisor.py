"""The process behind `lemix up`: start everything, keep it running, stop it in order. It decides nothing else.

Nothing is started before every check at the border holds. Whatever it starts dies with it: a supervisor that is
killed leaves no process behind, and `lemix up --resume` goes on from what is on disk.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import structlog

from lemix.creation import require_continuable
from lemix.data_dir import DataDir, RunningCluster
from lemix.held_out import Pair, read_held_out
from lemix.model_folder import ModelFolder, open_model_folder
from lemix.services import Service, pids
from lemix_common.broker import Broker, connect, hide_password
from lemix_common.children import last_reason, start_child, stop_children
from lemix_common.costs import Profile
from lemix_common.errors import BadInput, BrokerError, ClusterError, LemixError
from lemix_common.machine import is_free
from lemix_common.metrics import PORT_VARIABLE, metrics_address
from lemix_common.profile_file import read_profile
from lemix_common.server import RunningBroker, start_broker
from lemix_common.settings import ClusterSettings
from lemix_common.store.closing import last_checkpoint
from lemix_common.store.cluster import Cluster

log = structlog.get_logger()

STOP_TIMEOUT_S = 10.0
EMULATED_TOGETHER = 8
"""Emulated accelerators of one process: they only wait, and torch is loaded once."""
DEATHS_BEFORE_READY = 4
"""A process that died this often before the cluster was ready won't come up."""
BAD_INPUT_STATUS = 2
"""With which a process ends that was given something that can't work: it isn't started again."""
_TICK_S = 0.05
_LOGS_EVERY_S = 30.0
_METRICS_EVERY_S = 3.0
_NEEDED = ("celery", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is to be started, and where."""

    settings: ClusterSettings
    directory: DataDir
    cluster: str = "lemix"
    url: str = ""
    """A broker that runs already; empty: one of our own."""
    port: int = 0
    """Of our own broker; 0: any free one."""
    resume: bool = False


def supervise(launch: Launch, on_ready: Callable[[RunningCluster], None]) -> None:
    """Run a cluster until SIGINT or SIGTERM; call ``on_ready`` when it can serve.

    A first start that fails before it served anything leaves nothing but its logs, so the next one is a first again.
    """
    _require_extras()
    _require_possible(launch)
    emulated = _emulated_profile(launch.settings)
    model = open_model_folder(launch.settings.model, stages=launch.settings.stages)
    held_out = read_held_out(launch.settings.gate_file, model)
    with launch.directory.locked(), _stop_requests() as stop:
        is_used = launch.directory.has_state()
        try:
            with _broker_for(launch) as (url, ours):
                broker = connect(url, launch.cluster, patience_s=0)
                _require_resumed(broker, model, launch)
                is_used = is_used or bool(broker.hash(broker.keys.model))
                supervisor = Supervisor(launch, broker, url, stop, emulated)
                try:
                    supervisor.run(model, held_out, ours, on_ready)
                finally:
                    is_used = is_used or supervisor.is_ready or _has_items(broker)
                    supervisor.stop_children()
                    if launch.url and not is_used:
                        _erase(broker)
        finally:
            if not is_used:
                launch.directory.forget()


@dataclass
class StopRequests:
    """How often we were asked to stop."""

    count: int = 0
    event: threading.Event = field(default_factory=threading.Event)

    def note(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        self.count += 1
        self.event.set()


@dataclass
class Supervisor:
    """The supervisor's loop over its children."""

    launch: Launch
    broker: Broker
    url: str
    stop: StopRequests
    emulated: Profile | None = None
    """What the workers' accelerators act as, if they compute nothing."""
    services: list[Service] = field(default_factory=list)
    is_ready: bool = False
    _earlier_workers: frozenset[str] = frozenset()
    _logs_bounded_at: float = 0.0
    _metrics_shown_at: float = 0.0

    def run(
        self,
        model: ModelFolder,
        held_out: Sequence[Pair],
        ours: RunningBroker | None,
        on_ready: Callable[[RunningCluster], None],
    ) -> None:
        """Start the children, wait until the cluster can serve, keep them running until asked to stop."""
        cluster = Cluster(self.broker)
        cluster.create(self.launch.settings, model.fields(), model.tokenizer, held_out)
        if self.emulated is not None:
            cluster.publish_profile(self.emulated)
        self.launch.directory.remember(self.launch.settings)
        self._earlier_workers = frozenset(cluster.workers())
        now = time.monotonic()
        if ours is not None:
            self.services.append(Service("broker", ours.restart, process=ours.process, started_at=now))
        self.services += self._services()
        if not self._tend_until(self._can_serve):
            return
        self.is_ready = True
        self._announce()
        on_ready(self._running())
        self._tend_until(lambda: False)
        self._checkpoint()

    def stop_children(self) -> None:
        """End every child but the broker, which the others need until the last."""
        self.launch.directory.withdraw()
        living = [s.process for s in self.services if s.name != "broker" and s.process is not None]
        stop_children(reversed(living), timeout_s=STOP_TIMEOUT_S)
        self.launch.directory.clear()

    # ---- children
    def _services(self) -> list[Service]:
        together = EMULATED_TOGETHER if self.emulated is not None else 1
        slots = [f"worker-{i}" for i in range(self.launch.settings.num_workers)]
        workers = [
            self._service(
                slots[i],
                2 + i,
                "lemix_stage_worker",
                *(part for slot in slots[i : i + together] for part in ("--slot", slot)),
            )
            for i in range(0, len(slots), together)
        ]
        return [
            self._service("coordinator", 0, "lemix_coordinator"),
            self._service("operations", 1, "lemix_coordinator.operations"),
            *workers,
        ]

    def _service(self, name: str, number: int, module: str, *arguments: str) -> Service:
        first_port = metrics_address(os.environ).port
        environment = os.environ | {
            PORT_VARIABLE: str(first_port + number if first_port else 0),
            "LEMIX_URL": self.url,
            "LEMIX_CLUSTER": self.launch.cluster,
            "LEMIX_DATA_DIR": str(self.launch.directory.path),
            "OMP_NUM_THREADS": "1",  # two threads a process on contended cores are ten times slower
        }
        command = [sys.executable, "-m", module, *arguments]
        log_path = self.launch.directory.log(name)
        return Service(name, partial(start_child, command, log_path=log_path, environment=environment))

    def _tend_until(self, condition: Callable[[], bool]) -> bool:
        """Keep the children running until the condition holds; False if asked to stop before."""
        while not self.stop.event.is_set():
            self._tend()
            if condition():
                return True
            self.stop.event.wait(_TICK_S)
        return False

    def _tend(self) -> None:
        now = time.monotonic()
        started = [service.tend(now) for service in self.services]
        if any(started) and self.is_ready:
            self._announce()
        if now - self._logs_bounded_at > _LOGS_EVERY_S:
            self.launch.directory.bound_logs()
            self._logs_bounded_at = now
        if self.is_ready and now - self._metrics_shown_at > _METRICS_EVERY_S:
            with suppress(BrokerError):  # it is being restarted
                self.launch.directory.show_metrics(Cluster(self.broker).metrics())
            self._metrics_shown_at = now

    # ---- readiness
    def _can_serve(self) -> bool:
        """Whether somebody leads and every stage is ready on a worker of this start; `ClusterError` if none can be."""
        for service in self.services:
            if service.last_status == BAD_INPUT_STATUS or service.back_off.deaths >= DEATHS_BEFORE_READY:
                raise self._cannot_start(service)
        try:
            return self._all_ready()
        except BrokerError:
            return False  # it is being restarted

    def _cannot_start(self, service: Service) -> LemixError:
        log_path = self.launch.directory.log(service.name)
        kind = BadInput if service.last_status == BAD_INPUT_STATUS else ClusterError
        return kind(f"{service.name} can't start: {last_reason(log_path)} (see {log_path})")

    def _all_ready(self) -> bool:
        cluster = Cluster(self.broker)
        if reason := cluster.state().get("reason"):
            raise ClusterError(f"the cluster can't start: {reason}")
        living = {w for w, fields in cluster.workers().items() if "alive" in fields} - self._earlier_workers
        nodes = cluster.nodes(self.launch.settings.nodes)
        stages = range(self.launch.settings.stages)
        return bool(self.broker.again(lambda: self.broker.client.exists(self.broker.keys.leader))) and all(
            "epoch" in node
            and node.get(f"ready:{stage}") == node["epoch"]
            and node.get(f"stage:{stage}") in living
            for node in nodes
            for stage in stages
        )

    def _running(self) -> RunningCluster:
        return RunningCluster(
            url=self.url,
            cluster=self.launch.cluster,
            data_dir=str(self.launch.directory.path),
            pid=os.getpid(),
            processes=pids(self.services),
        )

    def _announce(self) -> None:
        self.launch.directory.announce(self._running())

    # ---- the last checkpoint
    def _checkpoint(self) -> None:
        """Make the committed steps durable as one checkpoint, unless asked to stop again meanwhile."""
        asked = self.stop.count

        def go_on() -> bool:
            self._tend()
            return self.stop.count == asked

        last_checkpoint(self.broker, self.launch.directory.checkpoints, go_on)


def _require_extras() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"a cluster needs {', '.join(missing)} on this machine: pip install 'lemix[all]'")


def _emulated_profile(settings: ClusterSettings) -> Profile | None:
    """The profile that emulated accelerators act by, read at the border; None where workers compute."""
    if not settings.emulated_profile:
        return None
    profile = read_profile(Path(settings.emulated_profile))
    if profile.num_stages != settings.stages:
        raise BadInput(
            f"the profile {settings.emulated_profile} is of {profile.num_stages} stages, not of {settings.stages}: "
            "use --stages, or another profile"
        )
    return profile


def _require_metrics_ports(launch: Launch) -> None:
    """Where they are fixed, each process has its own: the first, and those behind it."""
    address = metrics_address(os.environ)
    if address.port:
        for port in range(address.port, address.port + 2 + launch.settings.num_workers):
            if not is_free(address.host, port):
                raise BadInput(
                    f"port {port} on {address.host} is taken: choose another {PORT_VARIABLE}, or leave it out"
                )


def _require_possible(launch: Launch) -> None:
    if launch.url and launch.port:
        raise BadInput("--port is for a broker that `lemix up` starts: give either --port or --url")
    if launch.directory.is_locked():
        raise launch.directory.owned_by_another()
    _require_metrics_ports(launch)
    if launch.directory.has_state() and not launch.resume:
        raise BadInput(
            f"{launch.directory.path} holds a cluster's state: `lemix up --resume` goes on with it, "
            "another --data-dir starts afresh"
        )


@contextmanager
def _stop_requests() -> Iterator[StopRequests]:
    stop = StopRequests()
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _broker_for(launch: Launch) -> Iterator[tuple[str, RunningBroker | None]]:
    """The given broker, or one of our own that ends with us."""
    if launch.url:
        yield launch.url, None
        return
    log_path = launch.directory.log("broker")
    ours = start_broker(launch.directory.path, port=launch.port, log_path=log_path)
    log.info("broker_started", url=hide_password(ours.url), server=str(ours.server))
    try:
        yield ours.url, ours
    finally:
        ours.stop()


def _require_resumed(broker: Broker, model: ModelFolder, launch: Launch) -> None:
    """A broker that holds this cluster needs to be told to go on with it, and with the model it was started with."""
    if not launch.resume and broker.hash(broker.keys.model):
        raise BadInput(
            f"the broker holds a cluster {launch.cluster!r}: `lemix up --resume` goes on with it, "
            "another --cluster starts beside it"
        )
    require_continuable(broker, launch.settings, model)


def _has_items(broker: Broker) -> bool:
    try:
        return bool(broker.hash(broker.keys.totals))
    except BrokerError:
        return True  # unknown: keep what is there


def _erase(broker: Broker) -> None:
    for key in list(broker.client.scan_iter(match=f"{broker.keys.prefix}*", count=1000)):
        broker.client.unlink(key)
