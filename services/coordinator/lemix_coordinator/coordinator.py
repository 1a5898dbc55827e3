"""The coordinator's loop: keep the lead, read, decide, carry out; dispatch what clients submitted.

It is level-triggered: notices and submissions only wake it up, every decision is made on the hashes as they are. So a
coordinator that dies at any point is replaced by one that reads the same hashes and decides the same.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

import structlog

from lemix_common.broker import Broker, Entry
from lemix_common.errors import BrokerUnreachable, Fenced
from lemix_common.settings import ClusterSettings
from lemix_common.sign_of_life import SignOfLife
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import STAGE_0, Call, Items, fence
from lemix_common.store.training import Training
from lemix_common.store.updates import Updates
from lemix_common.store.versions import Versions
from lemix_coordinator.commands import (
    AdvanceOperation,
    ChooseWriters,
    ClearVersion,
    Command,
    ForgetSteps,
    ForgetWorker,
    LoadTraining,
    OpenSnapshot,
    PlaceNode,
    RetireVersion,
    StartStep,
)
from lemix_coordinator.placement import place
from lemix_coordinator.reader import Reader
from lemix_coordinator.scheduler import Scheduler
from lemix_coordinator.scheduling.work import Work
from lemix_coordinator.snapshots import snapshots
from lemix_coordinator.steps import QueuedExample, plan_next_step, weights_of
from lemix_coordinator.training import forget, train
from lemix_coordinator.transitions import Transitions
from lemix_coordinator.view import ClusterView, NodeView

log = structlog.get_logger()

TICK_S = 0.1
CONSUMER = "coordinator"
"""Under which leaders read what was submitted, one after the other."""
LEASE_S = 3.0
DISPATCH_AT_ONCE = 200
PLAN_AHEAD = 32
RECLAIM_EVERY_S = 1.0
LOOK_FOR_CLIENTS_EVERY_S = 1.0
ENQUEUE_AGAIN_S = 2.0


@dataclass
class Coordinator:
    """One coordinator process; leads or stands by."""

    name: str
    broker: Broker
    settings: ClusterSettings
    data_dir: Path
    transitions: Transitions
    sign_of_life: SignOfLife = field(default_factory=SignOfLife)
    epoch: int = 0
    """The leader's epoch; 0 while another leads."""
    view: ClusterView | None = None
    _outages: int = 0
    _trust_heartbeats_at: float = 0.0
    _trust_clients_at: float = 0.0
    _looked_for_clients_at: float = 0.0
    _reclaimed_at: float = 0.0
    _looked_back_at: float = 0.0
    _reclaimed_epochs: tuple[tuple[int, int, bool], ...] = ()
    _enqueued: dict[str, tuple[str, float]] = field(default_factory=dict)
    _retired: set[str] = field(default_factory=set)
    _waiting: dict[str, tuple[Entry, Work]] = field(default_factory=dict)
    """By entry, requests that were read and have no node yet, in their order."""

    def __post_init__(self) -> None:
        self.cluster, self.items = Cluster(self.broker), Items(self.broker)
        self.training, self.versions = Training(self.broker, MAIN_RUN), Versions(self.broker)
        self.updates = Updates(self.broker)
        now = self.broker.clock.now()
        self.reader = Reader(self.cluster, self.versions)
        self.scheduler = Scheduler(self.settings, self.broker)
        self._distrust_silence(now)

    def run(self, stop: threading.Event) -> None:
        """Lead, or stand by until the leader is gone, until told to stop."""
        keys = self.broker.keys
        seen = {keys.control: self.broker.last_id(keys.control), keys.submissions: "0-0"}
        while not stop.is_set():
            epoch = self.cluster.lead(self.name, expiry_s=LEASE_S)
            self.sign_of_life.show()
            if epoch is None:
                self.epoch = 0
                stop.wait(LEASE_S / 6)
                continue
            if epoch != self.epoch:
                if self.cluster.settings() != self.settings:
                    log.warning("settings_changed", reason="started again, it reads the new ones")
                    break
                log.info("leading", epoch=epoch)
                self.epoch, self._looked_back_at = epoch, 0.0
                self.scheduler.forget()
                self._waiting.clear()
            try:
                self.tick()
                news = self.broker.read(seen, block_s=TICK_S)
                if any(entry.stream == keys.submissions for entry in news):
                    self._dispatch(pending=False)  # before the next tick reads the cluster: somebody waits
            except Fenced:
                log.warning("lost_the_lead", epoch=self.epoch)
                self.epoch = 0
                continue
            seen |= {entry.stream: entry.id for entry in news}
        self.cluster.resign(self.name)

    def tick(self) -> None:
        """Read once, decide once, carry it out."""
        now = self.broker.clock.now()
        if self.broker.outages != self._outages:
            self._outages = self.broker.outages
            self._distrust_silence(now)
        self._take_back(now)
        self._plan_steps()
        view = self.view = self.reader.view(
            self.settings,
            now=now,
            trust_heartbeats=now >= self._trust_heartbeats_at,
        )
        self.scheduler.look(view, [work for _, work in self._waiting.values()])
        for command in decide(view):
            self.carry_out(command, view)
        self._reclaim(view, now)
        if now - self._looked_back_at >= RECLAIM_EVERY_S and self._ready():
            self._looked_back_at = now
            self._dispatch(pending=True)
        self._dispatch(pending=False)

    def carry_out(self, command: Command, view: ClusterView) -> None:
        """Make a decision real by one fenced call."""
        match command:
            case ForgetWorker(worker):
                log.warning("worker_lost", worker=worker)
                self.cluster.forget_worker(self.epoch, worker)
            case PlaceNode(node, workers, reason):
                log.info("node_placed", node=node, workers=workers, reason=reason)
                self.cluster.place(self.epoch, node, workers)
            case StartStep():
                self._start_step(command, view)
            case LoadTraining(step, directory, nodes, epochs, reason):
                log.info("training_state_loading", step=step, nodes=nodes, reason=reason)
                self.versions.load_training(
                    self.epoch,
                    run=MAIN_RUN,
                    step=step,
                    directory=directory,
                    nodes=nodes,
                    epochs=epochs,
                    seen_attempt=view.run.attempt,
                )
            case OpenSnapshot(kind, writers, epochs, reason):
                operation = f"{kind}-{view.run.lineage}.{view.run.committed}-{uuid.uuid4().hex[:8]}"
                log.info("operation_opened", operation=operation, reason=reason)
                root = self.data_dir / ("checkpoints" if kind == "checkpoint" else "versions")
                self.versions.open(
                    operation,
                    kind,
                    run=MAIN_RUN,
                    root=str(root),
                    optimizer=kind == "checkpoint",
                    writers=writers,
                    epochs=epochs,
                    leader_epoch=self.epoch,
                )
            case ChooseWriters(operation, state, writers, epochs, reason):
                log.info("writers_chosen", operation=operation, writers=writers, reason=reason)
                self.versions.choose_writers(self.epoch, operation, state, writers, epochs)
                self._enqueued.pop(operation, None)
            case AdvanceOperation(operation, progress):
                self._enqueue(operation, progress)
            case RetireVersion() | ClearVersion():
                self._end_version(command)
            case ForgetSteps(upto):
                self.training.forget_steps(self.epoch, upto)
            case _:
                assert_never(command)

    def _start_step(self, start: StartStep, view: ClusterView) -> None:
        """Begin a step on the nodes that the policy chooses, unless it holds it back for now."""
        shard_nodes = self.scheduler.share(start.step, start.members, view.run)
        if shard_nodes is None:
            return
        answer = self.training.start_step(
            self.epoch,
            start.step,
            weights=weights_of(self.settings, start.step, base=view.run.base),
            members=start.members,
            epochs=start.epochs,
            shard_nodes=shard_nodes,
            seen=view.run,
            goes_on=start.goes_on,
        )
        if answer == "ok":
            attempt = view.run.attempt + (not start.goes_on)
            self.scheduler.started(start.step, shard_nodes, attempt=attempt)
        log.info("step_started", step=start.step, members=start.members, reason=start.reason, answer=answer)

    def _end_version(self, command: RetireVersion | ClearVersion) -> None:
        match command:
            case RetireVersion(version):
                if retired := self.versions.retire(self.epoch):
                    log.info("version_retired", version=version)
                    self.transitions.remove(*retired)
            case ClearVersion(version):
                if self.updates.clear_draining(self.epoch, version):
                    log.info("version_cleared", version=version)

    def _enqueue(self, operation: str, progress: str) -> None:
        """Ask an operations worker for a transition; again after a while, since its message may have been lost."""
        now = self.broker.clock.now()
        last, at = self._enqueued.get(operation, ("", 0.0))
        if last != progress or now - at > ENQUEUE_AGAIN_S:
            self._enqueued = {name: when for name, when in self._enqueued.items() if now - when[1] < 60}
            self._enqueued[operation] = (progress, now)
            self.transitions.advance(operation)

    def _distrust_silence(self, now: float) -> None:
        """Whoever is silent may have had no broker to speak to: give all of them the time to be heard again."""
        self._trust_heartbeats_at = now + self.settings.heartbeat_expiry_s
        self._trust_clients_at = now + self.settings.client_expiry_s

    # ---- items that nobody wants any more
    def _take_back(self, now: float) -> None:
        """End what is past its deadline, and what was to end with a client that is gone."""
        if late := self.items.end_overdue(self.epoch):
            log.warning("deadlines_passed", items=late)
        if now < max(self._trust_clients_at, self._looked_for_clients_at + LOOK_FOR_CLIENTS_EVERY_S):
            return
        self._looked_for_clients_at = now
        try:  # not again after an outage, when every client may have been silent for too long
            hasty = Items(replace(self.broker, patience_s=0.0))
            if abandoned := hasty.cancel_abandoned(self.epoch):
                log.warning("clients_gone", items=abandoned)
        except BrokerUnreachable:
            self.broker.outages += 1

    # ---- training
    def _plan_steps(self) -> None:
        run = self.training.state()
        while run.planned - run.committed < PLAN_AHEAD and self._plan_one(run.planned + 1, run.flushes):
            run = self.training.state()

    def _plan_one(self, step: int, flushes: Sequence[str]) -> bool:
        entries = self.training.queued_examples(self.settings.step_examples)
        if not entries:
            return False
        if self.settings.max_step_wait_s and self._age_s(entries[0]) > self.settings.max_step_wait_s:
            flushes = (*flushes, entries[-1].id)
        fields = self.broker.hashes(self.broker.keys.item(entry.fields["item"]) for entry in entries)
        gone = [entry for entry, item in zip(entries, fields, strict=True) if item.get("state") != "queued"]
        if gone:
            self.training.drop_examples(self.epoch, gone)
            return True
        queued = [
            QueuedExample(
                entry=entry.id,
                item=entry.fields["item"],
                tokens=int(entry.fields["tokens"]),
                reference_tokens=int(entry.fields["reference_tokens"]),
            )
            for entry in entries
        ]
        planned = plan_next_step(queued, self.settings, run=MAIN_RUN, step=step, flushes=flushes)
        if planned is None:
            return False
        answer = self.training.plan(self.epoch, planned[0], cursor=planned[1])
        log.info("step_planned", step=step, examples=len(planned[0].items), answer=answer)
        return True

    def _age_s(self, entry: Entry) -> float:
        return self.broker.clock.now() - int(entry.id.partition("-")[0]) / 1000

    # ---- serving
    def _ready(self) -> list[int]:
        return [node.node for node in self.view.nodes if node.is_ready] if self.view else []

    def _dispatch(self, *, pending: bool) -> None:
        """Send submitted items to nodes; without a ready node, or where the policy says so, they wait.

        ``pending``: those that were read before and not dispatched, by a leader that died or was paused in between,
        because the broker's reply was lost, or since they wait.
        """
        if self.view is None:
            self.view = self.reader.view(self.settings, now=self.broker.clock.now(), trust_heartbeats=False)
            self.scheduler.look(self.view)
        if not self._ready():
            return
        calls = self._take_in_pending() if pending else self._take_in_new()
        if self._waiting and self.scheduler.policy.uses_state:
            self.scheduler.refresh()
        for entry, work in list(self._waiting.values()):
            if (placed := self.scheduler.place(work)) is not None:
                calls.append(self.items.dispatch(self.epoch, entry, placed.node, placed.about))
                del self._waiting[entry.id]
        for answer in self.broker.call_many(calls):
            fence(answer)

    def _take_in_new(self) -> list[Call]:
        return self._take_in(self.items.submitted(CONSUMER, count=DISPATCH_AT_ONCE, pending=False), {})

    def _take_in_pending(self) -> list[Call]:
        """All that has been read and not dispatched, as Redis has it; who waits keeps what is known of it."""
        calls: list[Call] = []
        known, self._waiting, last = self._waiting, {}, "0"
        while entries := self.items.submitted(CONSUMER, count=DISPATCH_AT_ONCE, pending=True, behind=last):
            calls += self._take_in(entries, known)
            last = entries[-1].id
        return calls

    def _take_in(self, entries: Sequence[Entry], known: Mapping[str, tuple[Entry, Work]]) -> list[Call]:
        """Let them wait for a node; returns the calls that drop those that nobody waits for any more."""
        works = self.scheduler.queued(entry.fields["item"] for entry in entries)
        gone = []
        for entry in entries:
            work = works.get(entry.fields["item"])
            if work is None:
                gone.append(self.items.dispatch(self.epoch, entry, 0))
            else:
                self._waiting[entry.id] = known.get(entry.id, (entry, work))
        return gone

    def _reclaim(self, view: ClusterView, now: float) -> None:
        """Send items on that a lost stage 0, or an earlier placement of the node, had taken into work.

        A node's consumer is ``worker:epoch``: whatever another consumer still holds is nobody's. Entries nobody has
        pulled leave a node that isn't ready when another one is.
        """
        epochs = tuple((node.node, node.epoch, node.is_ready) for node in view.nodes)
        if epochs == self._reclaimed_epochs and now - self._reclaimed_at < RECLAIM_EVERY_S:
            return
        self._reclaimed_epochs, self._reclaimed_at = epochs, now
        for node in view.nodes:
            entries = {entry.id: entry for entry in self.items.work_of(node.node)}
            if not entries:
                continue
            held = set(self._held_by_others(node))
            movable = held | (set() if node.is_ready or not self._ready() else entries.keys())
            moved = [entries[entry] for entry in sorted(movable & entries.keys())]
            targets = self.scheduler.elsewhere([entry.fields["item"] for entry in moved])
            calls = [
                self.items.redispatch(
                    self.epoch, node.node, entry, target=target, reason="its stages were lost"
                )
                for entry, target in zip(moved, targets, strict=True)
            ]
            for answer in self.broker.call_many(calls):
                fence(answer)
            if calls:
                log.warning("items_reclaimed", node=node.node, items=len(calls))

    def _held_by_others(self, node: NodeView) -> Iterator[str]:
        stream = self.broker.keys.work(node.node)
        current = stage_0_consumer(node.stages[0].worker, node.epoch)
        client = self.broker.client
        for consumer in self.broker.again(lambda: client.xinfo_consumers(stream, STAGE_0)):
            if consumer["name"] == current:
                continue
            if consumer["pending"]:
                pending = self.broker.again(
                    lambda name=consumer["name"]: client.xpending_range(  # type: ignore[misc]
                        stream, STAGE_0, "-", "+", 10_000, consumername=name
                    )
                )
                yield from (str(held["message_id"]) for held in pending)
            else:
                self.items.forget_consumer(self.epoch, node.node, consumer["name"])


def stage_0_consumer(worker: str, epoch: int) -> str:
    """The name under which a node's stage 0 pulls: another one in each placement epoch."""
    return f"{worker}:{epoch}"


def decide(view: ClusterView) -> Iterator[Command]:
    """Every rule in its turn; each is a pure function of the view."""
    placed = list(place(view))
    yield from placed
    if not any(isinstance(command, PlaceNode) for command in placed):
        trained = list(train(view))
        opened = {command.kind for command in trained if isinstance(command, OpenSnapshot)}
        yield from trained
        for command in snapshots(view):
            is_twin = (
                isinstance(command, OpenSnapshot) and command.kind in opened
            )  # one does for both reasons
            if not is_twin:
                yield command
        yield from forget(view)
