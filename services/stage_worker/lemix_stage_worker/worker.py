"""The stage worker: one compute loop that owns all state, fed by threads through one inbox.

::

    control stream ─┐                                   ┌─▶ frames to neighbours
    items pulled ───┼─▶ inbox ─▶ handle ─▶ ready queue ─┤
    frames in ──────┤            (cheap)   (most urgent ├─▶ reports to the broker (a thread)
    background work ┘                       step first) └─▶ files and loading (a thread)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from torch import Tensor

from lemix_common.broker import Broker
from lemix_common.errors import BadFrame, ClusterError, LemixError, ModelError
from lemix_common.fields import from_fields
from lemix_common.messages import (
    AddShardGradients,
    AddTiedGradient,
    ForwardFailed,
    Frame,
    ItemCancelled,
    LoadTraining,
    Notice,
    PlacementChanged,
    PrepareVersion,
    ReleaseItem,
    RunForward,
    RunStep,
    ScoresComputed,
    StageReady,
    StepCommitted,
    TokenChosen,
    TrainBackward,
    TrainForward,
    VersionRetired,
    WriteShards,
)
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import Call, Items, StartedItem
from lemix_common.store.training import GradientReport, Training
from lemix_common.store.versions import Versions
from lemix_stage_worker.hosted_stage import (
    BASE_DIRECTORY,
    HostedStage,
    Neighbourhood,
    build_template,
    load_training,
    load_version,
    training_on,
)
from lemix_stage_worker.inbox import (
    Arrival,
    Finished,
    FrameArrived,
    Inbox,
    ItemsStarted,
    ItemStale,
    NoticeRead,
    PeerGone,
)
from lemix_stage_worker.learning import Learner
from lemix_stage_worker.links import Links
from lemix_stage_worker.memory import peak_rss_bytes
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.puller import Puller
from lemix_stage_worker.ready_queue import CATEGORY, ReadyQueue, Step, Task
from lemix_stage_worker.reporter import Reporter, Span
from lemix_stage_worker.serving import Serving
from lemix_stage_worker.shard_files import write_shard

log = structlog.get_logger()
T = TypeVar("T")

IDLE_WAIT_S = 0.5
Position = tuple[int, int]
"""(node, stage)."""


@dataclass
class Worker:
    """One worker process."""

    name: str
    broker: Broker
    settings: ClusterSettings
    source: ModelSource
    layers: tuple[range, ...]
    links: Links
    inbox: Inbox
    reporter: Reporter
    progress: int = 0
    """Rises with every turn of the compute loop."""
    busy_since: float | None = None
    """Monotonic time at which the step in progress began."""
    longest_step_s: float = 0.0
    hosts: dict[Position, HostedStage] = field(default_factory=dict)
    learners: dict[Position, Learner] = field(default_factory=dict)
    neighbours: dict[int, Neighbourhood] = field(default_factory=dict)
    """Of every node, as last read."""
    pullers: dict[int, Puller] = field(default_factory=dict)
    ready: ReadyQueue = field(default_factory=ReadyQueue)
    _held: list[FrameArrived] = field(default_factory=list)
    """Frames of a placement this worker hasn't taken up yet."""
    _background: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
    )
    _building: set[Position] = field(default_factory=set)
    _last_training: tuple[float, float] = (0.0, 0.0)
    _failure: Exception | None = None

    def __post_init__(self) -> None:
        self.now = self.broker.clock.now
        self.cluster, self.items = Cluster(self.broker), Items(self.broker)
        self.training, self.versions = Training(self.broker, MAIN_RUN), Versions(self.broker)
        self.serving = Serving(self.items, self, self.now)
        self.stop_ids = self.source.eos_ids

    # ---- the loop
    def run(self, stop: threading.Event) -> None:
        """Compute until told to stop; then report what is left and close."""
        read_until = self.broker.last_id(
            self.broker.keys.control
        )  # before any hash, so that no change is missed
        control = threading.Thread(
            target=self._read_control, args=(stop, read_until), name="control", daemon=True
        )
        control.start()
        self.reporter.start()
        for node in range(self.settings.nodes):
            self._read_placement(node)
        while not stop.is_set():
            self.turn(wait_s=0.0 if self.ready else IDLE_WAIT_S)
            if self._failure is not None:
                raise self._failure
        for puller in self.pullers.values():
            puller.stop()
        self.links.close()
        self._background.shutdown(cancel_futures=True)
        self.reporter.close()
        control.join(timeout=10.0)

    def turn(self, *, wait_s: float) -> None:
        """Take in what arrived, then run the most urgent step."""
        for arrival in self.inbox.drain(wait_s=wait_s):
            self._handle(arrival)
        if self.ready:
            self._compute(self.ready.take())

    def _compute(self, step: Step) -> None:
        """Run a step to its end, or to a safepoint at which serving is ready."""
        start = self.now()
        while True:
            self._advance(step)
            self.progress += 1
            if step.is_done:
                break
            for arrival in self.inbox.drain(wait_s=0.0):
                self._handle(arrival)
            if self.ready.must_give_way(step):
                self.ready.put_back(step)
                break
        self._note(step.task, start, self.now())

    def _advance(self, step: Step) -> None:
        self.busy_since = began = time.monotonic()
        try:
            step.advance()
        except Exception as error:  # noqa: BLE001 - the loop's one broad handler: the item fails, the worker lives
            step.is_done = True
            step.task.failed(error)
        self.busy_since = None
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - began)

    def _note(self, task: Task, start: float, end: float) -> None:
        blocked_s = 0.0
        if task.is_training:
            self._last_training = (start, end)
        else:
            training_start, training_end = self._last_training
            blocked_s = max(0.0, training_end - max(training_start, task.ready_at))
        self.reporter.span(
            Span(
                node=task.node,
                stage=task.stage,
                worker=self.name,
                cat=CATEGORY[task.urgency],
                item=task.item,
                version=task.version,
                start=start,
                end=end,
                blocked_s=blocked_s,
            )
        )

    def _handle(self, arrival: Arrival) -> None:
        match arrival:
            case FrameArrived():
                self._frame(arrival)
            case NoticeRead(notice):
                self._notice(notice)
            case ItemsStarted(node, epoch, items):
                self._items_started(node, epoch, items)
            case ItemStale(node, item, attempt):
                self._item_gone(node, item, attempt)
            case PeerGone(peer):
                self._peer_gone(peer)
            case Finished(then):
                then()

    # ---- frames
    def _frame(self, arrived: FrameArrived) -> None:
        frame = arrived.frame
        host = self.hosts.get((frame.node, frame.stage))
        known = self.neighbours.get(frame.node)
        if known is None or frame.epoch > known.epoch or (host is not None and frame.epoch > host.epoch):
            self._held.append(arrived)  # the notice of that placement is on its way
        elif host is None or frame.epoch < host.epoch:
            arrived.release()  # sent under an older placement
        elif arrived.peer not in self._peers():
            log.warning("stranger_refused", peer=arrived.peer, frame=type(frame).__name__)
            arrived.release()
        else:
            self._deliver(host, arrived)

    def _deliver(self, host: HostedStage, arrived: FrameArrived) -> None:
        frame, tensors, release = arrived.frame, arrived.tensors, arrived.release
        match frame:
            case RunForward():
                self.serving.forward(host, frame, tensors, release=release, at=arrived.at)
            case TokenChosen():
                self.serving.token_chosen(host, frame)
            case ScoresComputed():
                self.serving.scores_computed(host, frame, tensors[0])
                release()
            case ForwardFailed(item=item, attempt=attempt, reason=reason):
                self.serving.fail(host, item, attempt, reason)
            case ReleaseItem():
                self.serving.release(host, frame)
            case TrainForward() | TrainBackward() | AddShardGradients() | AddTiedGradient():
                self.learners[host.node, host.stage].frame(frame, tensors, release, arrived.at)

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for arrived in held:
            self._frame(arrived)

    def _peers(self) -> set[str]:
        return {worker for known in self.neighbours.values() for worker, _ in known.hosts}

    # ---- notices
    def _read_control(self, stop: threading.Event, read_until: str) -> None:
        stream = self.broker.keys.control
        seen = {stream: read_until}
        while not stop.is_set():
            for entry in self.broker.read(seen, block_s=1.0):
                seen[stream] = entry.id
                try:
                    self.inbox.post(NoticeRead(from_fields(entry.fields)))
                except BadFrame as error:
                    log.warning("bad_notice", entry=entry.id, reason=str(error))

    def _notice(self, notice: Notice) -> None:
        match notice:
            case PlacementChanged(node=node):
                self._read_placement(node)
            case StageReady(node=node):
                self._pull_if_whole(node)
            case RunStep():
                self._each_learner(lambda learner: learner.run_step(notice))
            case StepCommitted():
                self._each_learner(lambda learner: learner.step_committed(notice))
            case WriteShards():
                self._each_learner(lambda learner: learner.write_shards(notice))
            case LoadTraining():
                self._each_learner(lambda learner: self._load_training(learner, notice))
            case PrepareVersion(version=version, directory=directory):
                for host in self.hosts.values():
                    self._prepare(host, version, directory)
            case VersionRetired(version=version):
                for host in self.hosts.values():
                    host.versions.pop(version, None)
            case ItemCancelled(item=item, node=node):
                self._item_gone(node, item, None)
            case _:
                pass  # for the coordinator

    def _each_learner(self, act: Callable[[Learner], object]) -> None:
        for learner in list(self.learners.values()):
            act(learner)

    # ---- placement
    def _read_placement(self, node: int) -> None:
        """Read who hosts the node now, and where they are reached, then take it up."""

        def read() -> tuple[dict[str, str], dict[str, str]]:
            fields = self.broker.hash(self.broker.keys.node(node))
            hosts = [fields.get(f"stage:{stage}", "") for stage in range(self.settings.stages)]
            about = self.broker.hashes(self.broker.keys.worker(worker) for worker in hosts)
            return fields, {w: known.get("address", "") for w, known in zip(hosts, about, strict=True)}

        self._in_background(read, lambda answer: self._take_placement(node, *answer))

    def _take_placement(self, node: int, fields: Mapping[str, str], addresses: Mapping[str, str]) -> None:
        epoch = int(fields.get("epoch", 0))
        known = self.neighbours.get(node)
        if not epoch or (known is not None and epoch <= known.epoch):
            return
        hosts = [fields.get(f"stage:{stage}", "") for stage in range(self.settings.stages)]
        self.neighbours[node] = Neighbourhood(epoch, tuple((w, addresses.get(w, "")) for w in hosts))
        self.links.forget({address for known in self.neighbours.values() for _, address in known.hosts})
        if puller := self.pullers.pop(node, None):
            puller.stop()
        self.serving.drop_all(node)
        for stage, worker in enumerate(hosts):
            host = self.hosts.get((node, stage))
            if worker != self.name:
                self.hosts.pop((node, stage), None)
                self.learners.pop((node, stage), None)
            elif host is None and (node, stage) not in self._building:
                self._build(node, stage, epoch)
            elif host is None:
                pass  # it takes the newest epoch when it is built
            else:
                host.epoch, host.is_ready = epoch, False
                host.caches.clear()
                self._report_ready(host)

    def _build(self, node: int, stage: int, epoch: int) -> None:
        def build() -> HostedStage:
            template = build_template(self.source, stage, self.layers)
            live = self.versions.live()
            served = {
                version: load_version(
                    self.source, template, self.versions.version(version).get("directory", "")
                )
                for version in {live[name] for name in ("served", "draining", "preparing") if live.get(name)}
            }
            run = self.training.state()
            training = None
            if run.committed == 0 and node in self.settings.training_nodes:
                base = served.get(f"{run.lineage}.0") or load_version(self.source, template, BASE_DIRECTORY)
                training = training_on(base, template, 0)
            return HostedStage(
                node=node,
                stage=stage,
                stages=self.settings.stages,
                source=self.source,
                template=template,
                versions=served,
                training=training,
                epoch=epoch,
            )

        def built(host: HostedStage) -> None:
            self._building.discard((node, stage))
            known = self.neighbours[node]
            if known.hosts[stage][0] != self.name:
                return
            host.epoch = known.epoch
            self.hosts[node, stage] = host
            self.learners[node, stage] = Learner(host, self, self.now)
            log.info(
                "stage_built",
                node=node,
                stage=stage,
                layers=str(self.layers[stage]),
                epoch=host.epoch,
                weight_bytes=host.template.weight_bytes,
                peak_rss_bytes=peak_rss_bytes(),
            )
            self._report_ready(host)

        def failed(error: Exception) -> None:
            if isinstance(error, ModelError) and self.versions.live().get("served") != "0.0":
                self._build(
                    node, stage, epoch
                )  # a version was retired while it was read: read what is live now
                return
            self.cluster.stage_failed(node, stage, epoch, str(error))
            self._failure = error

        self._building.add((node, stage))
        self._in_background(build, built, failed)

    def _report_ready(self, host: HostedStage) -> None:
        """Say that the stage can serve in its epoch; versions that became live meanwhile are loaded first."""
        epoch = host.epoch
        step = host.training.step if host.training is not None else None
        layers = self.layers[host.stage]

        def report() -> dict[str, object]:
            missing = self.cluster.stage_ready(
                self.name,
                node=host.node,
                stage=host.stage,
                epoch=epoch,
                training=step,
                versions=list(host.versions),
                layers=(layers.start, layers.stop - 1),
                memory_bytes=host.memory_bytes,
            )
            return {
                version: load_version(
                    self.source, host.template, self.versions.version(version).get("directory", "")
                )
                for version in missing
            }

        def reported(loaded: dict[str, object]) -> None:
            host.versions.update(loaded)  # type: ignore[arg-type]
            if host.epoch != epoch:
                return
            if loaded:
                self._report_ready(host)
                return
            host.is_ready = True
            if host.training is not None and host.training.step != step:  # an optimizer ran meanwhile
                self.training_at(host, host.training.step)
            self._release_held()
            self._pull_if_whole(host.node)

        self._in_background(report, reported, lambda error: self._try_ready_again(host, epoch, error))

    def _pull_if_whole(self, node: int) -> None:
        """Begin to pull when the node's last stage is ready: an item must not be started for a stage that is lost."""
        host = self.hosts.get((node, 0))
        if host is None or not host.is_ready or node in self.pullers:
            return
        epoch = host.epoch

        def is_whole() -> bool:
            fields = self.broker.hash(self.broker.keys.node(node))
            return all(fields.get(f"ready:{stage}") == str(epoch) for stage in range(host.stages))

        def pull(whole: bool) -> None:
            if whole and host.epoch == epoch and node not in self.pullers:
                puller = self.pullers[node] = Puller(
                    self.items, self.inbox, self.name, node, epoch, self.settings.max_running
                )
                puller.start()

        self._in_background(is_whole, pull)

    def _try_ready_again(self, host: HostedStage, epoch: int, error: Exception) -> None:
        log.warning("stage_not_ready", node=host.node, stage=host.stage, reason=str(error))
        if host.epoch == epoch:
            self._report_ready(host)

    def _peer_gone(self, peer: str) -> None:
        """A neighbour's connection ended: its nodes may have lost messages."""
        for node, known in self.neighbours.items():
            if any(worker == peer for worker, _ in known.hosts):
                self._link_lost(node, known.epoch, peer)

    def _link_lost(self, node: int, epoch: int, peer: str) -> None:
        self._in_background(lambda: self.cluster.link_lost(node, epoch, peer), lambda _: None)

    # ---- versions
    def _prepare(self, host: HostedStage, version: str, directory: str) -> None:
        def prepared(shell: object) -> None:
            host.versions[version] = shell  # type: ignore[assignment]
            self._in_background(
                lambda: self.versions.prepared(version, node=host.node, stage=host.stage, epoch=host.epoch),
                lambda _: None,
            )

        self._in_background(lambda: load_version(self.source, host.template, directory), prepared)

    # ---- items
    def _items_started(self, node: int, epoch: int, items: Sequence[StartedItem]) -> None:
        host = self.hosts.get((node, 0))
        if host is None or host.epoch != epoch:
            return  # their leases are of an older placement: the coordinator sends them on
        for started in items:
            if started.version in host.versions:
                self.serving.begin(host, started, self.stop_ids)
            else:
                log.error("version_missing", item=started.item, version=started.version, node=node)
                self._link_lost(node, epoch, self.name)

    def _item_gone(self, node: int, item: str, attempt: int | None) -> None:
        host, request = self.hosts.get((node, 0)), self.serving.requests.get((node, item))
        if host is None or request is None or attempt not in (None, request.started.attempt):
            return
        self.serving.drop(host, item)
        self.reporter.call(self.items.close_entry(node, request.started.entry))

    # ---- what serving and training ask for
    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node."""
        worker, address = self.neighbours[host.node].hosts[stage]
        if not self.links.send(worker, address, frame, tensors):
            self._link_lost(host.node, host.epoch, worker)

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """To the same stage of another node, if its placement is still the one meant."""
        known = self.neighbours.get(node)
        if known is None or known.epoch != epoch:
            return  # the attempt is over: its member starts afresh
        worker, address = known.hosts[frame.stage]
        if not self.links.send(worker, address, frame, tensors):
            self._link_lost(node, epoch, worker)

    def schedule(self, task: Task) -> None:
        """Let the loop run a step when it is its turn."""
        self.ready.add(task)

    def report(self, call: Call, item: StartedItem, node: int) -> None:
        """Tell the broker about an item; if it has gone elsewhere, drop it."""

        def answered(answer: Sequence[object]) -> None:
            if answer[0] != "ok":
                self.inbox.post(ItemStale(node, item.item, item.attempt))

        self.reporter.call(call, answered)

    def ended(self, node: int, entry: str) -> None:
        """An item left the node."""
        if puller := self.pullers.get(node):
            puller.ended(entry)

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Report a stage's gradients; the last one of the step commits it."""
        self.reporter.call(
            self.training.gradients_ready(step, attempt, node=host.node, stage=host.stage, report=report)
        )

    def training_at(self, host: HostedStage, step: int) -> None:
        """Report where a stage's training state is."""
        self.reporter.call(
            self.cluster.training_at(self.name, node=host.node, stage=host.stage, epoch=host.epoch, step=step)
        )

    def fetch_step(self, host: HostedStage, step: int, attempt: int, microbatches_of: int | None) -> None:
        """Read a planned step, and at stage 0 the examples of this node's microbatches."""
        learner = self.learners[host.node, host.stage]
        notice = learner.attempt.notice if learner.attempt else None

        def fetch() -> tuple[object, object]:
            planned = self.training.step(step)
            mine = [
                microbatch
                for microbatch in planned.microbatches
                if notice is not None and notice.shard_nodes[planned.shards[microbatch]] == microbatches_of
            ]
            examples = self.training.examples([planned.items[microbatch] for microbatch in mine])
            return planned, dict(zip(mine, examples, strict=True))

        self._in_background(fetch, lambda answer: learner.step_fetched(attempt, *answer))  # type: ignore[arg-type]

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot and report it."""
        directory = Path(request.directory)

        def write() -> None:
            report = write_shard(directory, host.stage, tensors)
            self.versions.shard_written(request.operation, host.stage, request.directory, report)

        self._in_background(write, lambda _: None)

    def _load_training(self, learner: Learner, notice: LoadTraining) -> None:
        host, epoch = learner.host, learner.host.epoch
        if not learner.load(notice):
            return

        def loaded(state: object) -> None:
            if host.epoch == epoch:
                learner.loaded(state)  # type: ignore[arg-type]

        self._in_background(
            lambda: load_training(self.source, host.template, notice.directory, notice.step), loaded
        )

    # ---- background work
    def _in_background(
        self,
        work: Callable[[], T],
        then: Callable[[T], None],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Do files, loading and calls that are waited for off the compute loop, one after another."""

        def finished(future: Future[T]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self.inbox.post(Finished(lambda: then(future.result())))
            elif isinstance(error, (LemixError, OSError, KeyError)) and failed is not None:
                self.inbox.post(Finished(lambda: failed(error)))
            else:
                self.inbox.post(Finished(lambda: self._give_up(error)))

        try:
            self._background.submit(work).add_done_callback(finished)
        except RuntimeError as error:  # the worker is closing
            log.debug("not_done_any_more", reason=str(error))

    def _give_up(self, error: BaseException) -> None:
        log.error("background_failed", reason=f"{type(error).__name__}: {error}")
        self._failure = error if isinstance(error, Exception) else ClusterError(str(error))
