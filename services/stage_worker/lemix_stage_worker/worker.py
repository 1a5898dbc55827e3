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
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from torch import Tensor

from lemix_common.broker import Broker
from lemix_common.errors import BadFrame
from lemix_common.fields import from_fields
from lemix_common.ids import Version
from lemix_common.messages import (
    AddShardGradients,
    AddTiedGradient,
    ForwardDone,
    ForwardFailed,
    Frame,
    ItemCancelled,
    LoadTraining,
    Notice,
    OpenItem,
    PlacementChanged,
    PrepareVersion,
    ReleaseItem,
    RunForward,
    RunStep,
    StageReady,
    StepCommitted,
    TrainBackward,
    TrainForward,
    VersionCleared,
    VersionPublished,
    VersionRetired,
    WriteShards,
)
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import Call, Items, StartedItem
from lemix_common.store.training import GradientReport, PlannedStep, Training
from lemix_common.store.updates import Updates
from lemix_common.store.versions import Versions
from lemix_stage_worker.background import Background
from lemix_stage_worker.decoding import lazy_decoder
from lemix_stage_worker.device import used_memory_bytes, wait_for
from lemix_stage_worker.forwarding import Arrived, Forwarding
from lemix_stage_worker.hosted_stage import HostedStage, stage_of
from lemix_stage_worker.hosting import Hosting, Position
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
from lemix_stage_worker.model.skeleton import HEAD_WEIGHT
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.ready_queue import CATEGORY, ReadyQueue, Step, Task
from lemix_stage_worker.reporter import Reporter, Span
from lemix_stage_worker.serving import Serving
from lemix_stage_worker.shard_files import write_shard
from lemix_stage_worker.step_work import Example, microbatches_of
from lemix_stage_worker.tenancy import Tenancy
from lemix_stage_worker.weight_probe import probe

log = structlog.get_logger()

IDLE_WAIT_S = 0.5
NAMED_IN_SPAN = 16
"""Items of an iteration that its span names; beyond that it says how many more."""


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
    learners: dict[Position, Learner] = field(default_factory=dict)
    _held: list[FrameArrived] = field(default_factory=list)
    """Frames of a placement this worker hasn't taken up yet."""

    def __post_init__(self) -> None:
        self.now = self.broker.clock.now
        self.ready = ReadyQueue(is_fifo=self.settings.order == "fifo")
        self.tenancy = Tenancy(self.settings.min_training_share, self.settings.max_block_ms / 1000)
        self.cluster, self.items = Cluster(self.broker), Items(self.broker)
        self.training, self.versions = Training(self.broker, MAIN_RUN), Versions(self.broker)
        self.forwarding = self.make_forwarding()
        self.serving = Serving(
            self.items,
            Updates(self.broker),
            self,
            self.forwarding,
            self.settings,
            self.now,
            lazy_decoder(self.cluster.tokenizer),
        )
        self.background = Background(self.inbox)
        self.hosting = self.make_hosting()
        self.stop_ids = self.source.eos_ids

    # ---- what computes: an emulated worker has others
    def make_forwarding(self) -> Forwarding:
        """What computes iterations."""
        return Forwarding(self)

    def make_hosting(self) -> Hosting:
        """What builds stages."""
        return Hosting(
            name=self.name,
            broker=self.broker,
            settings=self.settings,
            source=self.source,
            layers=self.layers,
            links=self.links,
            inbox=self.inbox,
            background=self.background,
            owner=self,
        )

    def make_learner(self, host: HostedStage) -> Learner:
        """What trains a stage."""
        return Learner(host, self.settings, self, self.now)

    @property
    def memory_used_bytes(self) -> int:
        """Of the accelerator."""
        return used_memory_bytes(self.source.device)

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
            self.hosting.read_placement(node)
        while not stop.is_set():
            self.turn(wait_s=self._patience_s() if self.ready else self.serving.next_wake_s(IDLE_WAIT_S))
            if self.background.failure is not None:
                raise self.background.failure
        self.hosting.close()
        self.links.close()
        self.background.close()
        self.reporter.close()
        control.join(timeout=10.0)

    def turn(self, *, wait_s: float) -> None:
        """Take in what arrived, then run the most urgent step."""
        is_patient, began = bool(self.ready) and wait_s > 0, self.now()
        for arrival in self.inbox.drain(wait_s=wait_s):
            self._handle(arrival)
        if is_patient:
            self.tenancy.earn(self.now() - began)
        if self.settings.batching == "paper" and not self.ready:
            self.hosting.each_first_stage(self.serving.wake)  # it waits for time to pass
        if self.ready and not self._patience_s():
            self._compute(self.ready.take(is_training_due=self.tenancy.is_training_due))

    def _patience_s(self) -> float:
        """How long training that is all there is waits for the next serving step."""
        if self.ready.is_fifo or self.ready.has_serving:
            return 0.0
        return self.tenancy.patience_s(self.now())

    def _compute(self, step: Step) -> None:
        """Run a step to its end, or to a safepoint at which it must give way."""
        start = now = self.now()
        if not step.task.is_training:
            self.tenancy.serving_begins(step.task.ready_at)
        is_begun = step.rest is not None
        while True:
            self._advance(step)
            self.progress += 1
            if not step.is_done:
                for arrival in self.inbox.drain(wait_s=0.0):
                    self._handle(arrival)
            began, now = now, self.now()
            self.tenancy.count(
                began, now, is_training=step.task.is_training, is_awaited=self.ready.is_awaited(step)
            )
            if step.is_done:
                break
            if self.ready.must_give_way(step) and not self.tenancy.is_training_due:
                self.ready.put_back(step)
                break
        self._note(step.task, start, now, is_whole=step.is_done and not is_begun)

    def _advance(self, step: Step) -> None:
        self.busy_since = began = time.monotonic()
        try:
            step.advance()
            wait_for(self.source.device)  # what comes next finds it free, and a span is what was computed
        except Exception as error:  # noqa: BLE001 - the loop's one broad handler: the item fails, the worker lives
            step.is_done = True
            step.task.failed(error)
        self.busy_since = None
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - began)

    def _note(self, task: Task, start: float, end: float, *, is_whole: bool) -> None:
        batch = task.batch
        items = batch.items if batch else [(task.item, start if task.is_training else task.ready_at)]
        if not items:
            return  # there was nothing to plan
        waits = {item: waited for item, at in items if (waited := self.tenancy.blocked_s(at, start)) > 0}
        lengths = task.lengths if is_whole else ()
        self.reporter.span(
            Span(
                node=task.node,
                stage=task.stage,
                worker=self.name,
                cat=CATEGORY[task.urgency],
                item=items[0][0],
                others=tuple(item for item, _ in items[1:NAMED_IN_SPAN]),
                more=max(0, len(items) - NAMED_IN_SPAN),
                version=batch.version if batch else task.version,
                tokens=batch.num_tokens if batch else sum(lengths),
                contexts=batch.contexts if batch else sum(length * length for length in lengths),
                start=start,
                end=end,
                blocked_s=max(waits.values(), default=0.0),
                waits=waits,
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
                self.hosting.peer_gone(peer)
            case Finished(then):
                then()

    # ---- frames
    def _frame(self, arrived: FrameArrived) -> None:
        frame = arrived.frame
        host = self.hosting.stages.get((frame.node, frame.stage))
        known = self.hosting.neighbours.get(frame.node)
        if known is None or frame.epoch > known.epoch or (host is not None and frame.epoch > host.epoch):
            self._held.append(arrived)  # the notice of that placement is on its way
        elif host is None or frame.epoch < host.epoch or self.hosting.is_lost(frame.node, frame.epoch):
            arrived.release()  # sent under an older placement, or behind what was lost
        elif arrived.peer not in self.hosting.peers():
            log.warning("stranger_refused", peer=arrived.peer, frame=type(frame).__name__)
            arrived.release()
        else:
            self._deliver(host, arrived)

    def _deliver(self, host: HostedStage, arrived: FrameArrived) -> None:
        frame, tensors, release = arrived.frame, arrived.tensors, arrived.release
        match frame:
            case RunForward():
                self.forwarding.arrive(host, Arrived(frame, tensors, release, arrived.at))
            case ForwardDone():
                self.serving.forward_done(host, frame, tensors)
                release()
            case ForwardFailed():
                self.serving.forward_failed(host, frame)
            case OpenItem():
                self.forwarding.open(host, frame, tensors)
                release()
            case ReleaseItem():
                self.forwarding.release(host, frame)
            case TrainForward() | TrainBackward() | AddShardGradients() | AddTiedGradient():
                self.learners[host.node, host.stage].frame(frame, tensors, release, arrived.at)

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
                self.hosting.read_placement(node)
            case StageReady(node=node):
                self.hosting.pull_if_whole(node)
            case RunStep():
                self._each_learner(lambda learner: learner.run_step(notice))
            case StepCommitted():
                self._each_learner(lambda learner: learner.step_committed(notice))
            case WriteShards():
                self._each_learner(lambda learner: learner.write_shards(notice))
            case LoadTraining():
                for learner in self.learners.values():
                    if learner.load(notice):
                        self.hosting.load_training(learner.host, notice)
            case PrepareVersion() | VersionPublished() | VersionCleared() | VersionRetired():
                self._version(notice)
            case ItemCancelled(item=item, node=node):
                self._item_gone(node, item, None)
            case _:
                pass  # for the coordinator

    def _version(self, notice: PrepareVersion | VersionPublished | VersionCleared | VersionRetired) -> None:
        match notice:
            case PrepareVersion(version=version):
                self.hosting.prepare(version)
            case VersionPublished(version=version):
                self.serving.served = version
            case VersionCleared(version=version):
                self.serving.cleared = version
            case VersionRetired(version=version):
                self.hosting.retire(version)

    def _each_learner(self, act: Callable[[Learner], object]) -> None:
        for learner in list(self.learners.values()):
            act(learner)

    # ---- items
    def _items_started(self, node: int, epoch: int, items: Sequence[StartedItem]) -> None:
        host = self.hosting.stages.get((node, 0))
        if host is None or host.epoch != epoch:
            return  # their leases are of an older placement: the coordinator sends them on
        for started in items:
            if started.version in host.versions:
                self.serving.begin(host, started, self.stop_ids)
            else:
                log.error("version_missing", item=started.item, version=started.version, node=node)
                self.hosting.link_lost(node, epoch, self.name)

    def _item_gone(self, node: int, item: str, attempt: int | None) -> None:
        host, request = self.hosting.stages.get((node, 0)), self.serving.requests.get((node, item))
        if host is None or request is None or attempt not in (None, request.started.attempt):
            return
        self.serving.drop(host, item)
        self.reporter.call(self.items.close_entry(node, request.started.entry))

    # ---- what hosting tells
    def node_renewed(self, node: int) -> None:
        """Its requests are somebody else's, or come again."""
        self.serving.drop_all(node)
        self.forwarding.forget(node)

    def stage_built(self, host: HostedStage) -> None:
        """It can learn from now on."""
        self.learners[host.node, host.stage] = self.make_learner(host)

    def stage_gone(self, position: Position) -> None:
        """Its steps are another worker's."""
        self.learners.pop(position, None)

    def stage_ready(self, host: HostedStage) -> None:
        """Take the frames that came before."""
        log.debug("stage_ready", node=host.node, stage=host.stage, epoch=host.epoch)
        held, self._held = self._held, []
        for arrived in held:
            self._frame(arrived)

    # ---- what serving and training ask for
    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node, unless it starts afresh."""
        if self.hosting.is_lost(host.node, host.epoch):
            return
        worker, address = self.hosting.neighbours[host.node].hosts[stage]
        if not self.links.send(worker, address, frame, tensors):
            self.hosting.link_lost(host.node, host.epoch, worker)

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """To the same stage of another node, if its placement is still the one meant."""
        known = self.hosting.neighbours.get(node)
        if known is None or known.epoch != epoch:
            return  # the attempt is over: its member starts afresh
        worker, address = known.hosts[frame.stage]
        if not self.links.send(worker, address, frame, tensors):
            self.hosting.link_lost(node, epoch, worker)

    def schedule(self, task: Task) -> None:
        """Let the loop run a step when it is its turn."""
        self.ready.add(task)

    def report(
        self, call: Call, item: StartedItem, node: int, then: Callable[[Sequence[object]], None] | None = None
    ) -> None:
        """Tell the broker about an item, and go on with its answer; if the item has gone elsewhere, drop it."""

        def answered(answer: Sequence[object]) -> None:
            if answer[0] != "ok":
                self.inbox.post(ItemStale(node, item.item, item.attempt))
            elif then is not None:
                self.inbox.post(Finished(lambda: then(answer)))

        self.reporter.call(call, answered)

    def report_tokens(self, call: Call, items: Sequence[StartedItem], node: int) -> None:
        """Tell the broker tokens of these items; those that have gone elsewhere are dropped."""

        def answered(answers: Sequence[object]) -> None:
            for item, answer in zip(items, answers, strict=True):
                if answer != "ok":
                    self.inbox.post(ItemStale(node, item.item, item.attempt))

        self.reporter.call(call, answered)

    def ended(self, node: int, entry: str) -> None:
        """An item left the node."""
        if puller := self.hosting.pullers.get(node):
            puller.ended(entry)

    def num_workers(self, node: int) -> int:
        """How many workers host the node's stages."""
        return len({worker for worker, _ in self.hosting.neighbours[node].hosts})

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Report a stage's gradients; the last one of the step commits it."""
        self.reporter.call(
            self.training.gradients_ready(step, attempt, node=host.node, stage=host.stage, report=report)
        )

    def training_at(self, host: HostedStage, step: int) -> None:
        """Report where a stage's training state is."""
        assert host.training is not None
        self.reporter.call(
            self.cluster.training_at(
                self.name,
                node=host.node,
                stage=host.stage,
                epoch=host.epoch,
                training=Version(host.training.lineage, step),
            )
        )

    def fetch_step(self, host: HostedStage, notice: RunStep) -> None:
        """Read a planned step, and at stage 0 the examples of this node's microbatches."""
        learner = self.learners[host.node, host.stage]

        def fetch() -> tuple[PlannedStep, dict[int, list[Example]]]:
            planned = self.training.step(notice.step)
            mine = microbatches_of(planned, notice, host.node) if host.is_first else ()
            wanted = {microbatch: planned.examples_of(microbatch) for microbatch in mine}
            items = [planned.items[example] for some in wanted.values() for example in some]
            read = iter(self.training.examples(items))
            return planned, {microbatch: [next(read) for _ in some] for microbatch, some in wanted.items()}

        self.background.do(fetch, lambda answer: learner.step_fetched(notice, *answer))

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Write a snapshot and report it."""
        directory, weights = Path(request.directory), dict(tensors)
        tied_to, state = host.template.tied_to, host.training
        if request.optimizer and tied_to is not None and tied_to not in weights and state is not None:
            weights[tied_to] = state.model.leaves()[HEAD_WEIGHT].detach().clone()  # the first stage writes it

        def write() -> None:
            report = write_shard(directory, host.stage, tensors)
            if request.optimizer:
                report["probe"] = probe(stage_of(host.source, host.template, weights))
            self.versions.shard_written(request.operation, host.stage, request.directory, report)

        self.background.do(write)
