"""Training on one stage: steps in attempts, microbatches in the schedule's order, shards' sums, commit, optimizer.

A step is computed in attempts. Its gradients are kept until the step commits or another attempt begins; the optimizer
runs only when the control stream says that the step is committed.

In which order the pieces of a step run, `course` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from torch import Tensor

from lemix_common.ids import Version
from lemix_common.messages import (
    AddShardGradients,
    AddTiedGradient,
    LoadTraining,
    RunStep,
    StepCommitted,
    TrainBackward,
    TrainForward,
    WriteShards,
)
from lemix_common.schedules import Work
from lemix_common.settings import ClusterSettings
from lemix_common.store.training import PlannedStep
from lemix_stage_worker.course import Course, Piece, pieces_of
from lemix_stage_worker.gradient_exchange import Channels, GradientExchange, address
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.ready_queue import Task, Urgency
from lemix_stage_worker.step_work import Example, MicrobatchPass, Returned, Row, StepWork
from lemix_stage_worker.tensors import copy_on, on_device
from lemix_stage_worker.trained_weights import Weights

log = structlog.get_logger()

TrainingFrame = TrainForward | TrainBackward | AddShardGradients | AddTiedGradient
URGENCY = {
    Work.FORWARD: Urgency.FORWARD,
    Work.BACKWARD: Urgency.BACKWARD,
    Work.INPUT_GRADIENT: Urgency.BACKWARD,
    Work.WEIGHT_GRADIENT: Urgency.WEIGHT_GRADIENT,
}


class TrainingSurroundings(Channels, Protocol):
    """What training needs of the worker around it."""

    def schedule(self, task: Task) -> None:
        """Let the compute loop run a step when it is its turn."""

    def training_at(self, host: HostedStage, step: int) -> None:
        """Report where this stage's training state is."""

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Make a snapshot durable in the background."""

    def fetch_step(self, host: HostedStage, notice: RunStep) -> None:
        """Read a planned step (and, at stage 0, this node's examples) in the background."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A frame that can't be taken yet."""

    frame: TrainingFrame
    tensors: tuple[Tensor, ...]
    release: Callable[[], None]
    at: float


@dataclass
class Learner:
    """One stage's training. Owned by the compute loop."""

    host: HostedStage
    settings: ClusterSettings
    around: TrainingSurroundings
    now: Callable[[], float]
    attempt: int = -1
    steps: dict[int, StepWork] = field(default_factory=dict)
    """Of the attempt, those whose optimizer hasn't run."""
    snapshots: list[WriteShards] = field(default_factory=list)
    _newest: int = -1
    """The last step of the attempt whose notice was read."""
    _ahead: list[Arrived] = field(default_factory=list)
    """Frames of a step whose notice hasn't been read yet."""
    _reserved: dict[tuple[int, int], int] = field(default_factory=dict)
    """(step, microbatch) to the bytes of activations that were predicted for it, from its forward to its end."""

    def __post_init__(self) -> None:
        self._course = Course(most_held=self.host.stages - self.host.stage)
        self._exchange = GradientExchange(
            self.host, self.around, is_alone=self.settings.replicas == "independent"
        )

    # ---- notices
    def run_step(self, notice: RunStep) -> None:
        """Begin an attempt, which drops whatever an earlier one computed, or go on with its next step."""
        epochs = dict(zip(notice.members, notice.epochs, strict=True))
        if notice.attempt != self.attempt:
            self._forget()
            self.attempt = notice.attempt
        self._newest = notice.step
        if epochs.get(self.host.node) != self.host.epoch:
            return
        self.steps[notice.step] = StepWork(notice, self.host.node, self._exchange.is_alone)
        self.around.fetch_step(self.host, notice)
        ahead, self._ahead = self._ahead, []
        for arrived in ahead:
            self.frame(arrived.frame, arrived.tensors, arrived.release, arrived.at)

    def step_fetched(
        self, notice: RunStep, planned: PlannedStep, examples: Mapping[int, Sequence[Example]]
    ) -> None:
        """The step's plan is here: its microbatches can begin."""
        work = self.steps.get(notice.step)
        if work is None or work.notice != notice:
            return
        work.plan(planned, examples, self.now())
        settings, host = self.settings, self.host
        self._course.add(
            pieces_of(
                settings.schedule,
                stage=host.stage,
                stages=host.stages,
                workers=settings.num_workers // settings.nodes,
                step=notice.step,
                microbatches=work.mine,
            )
        )
        self._go_on()

    def step_committed(self, notice: StepCommitted) -> None:
        """Run the optimizer on the gradients this stage reported."""
        work, state = self.steps.get(notice.step), self.host.training
        if work is None or work.notice.attempt != notice.attempt or work.total is None or state is None:
            return
        planned, total = work.planned, work.total
        assert planned is not None
        epoch = work.notice.epochs[work.notice.members.index(self.host.node)]

        def run() -> Iterator[None]:
            yield from state.apply(total, planned, scale=notice.scale)
            log.info(
                "optimizer_stepped",
                run=notice.run,
                step=notice.step,
                node=self.host.node,
                stage=self.host.stage,
            )
            if self._is_current(work):
                del self.steps[notice.step]
            if epoch != self.host.epoch and self.host.training is state:
                self.around.training_at(self.host, state.step)  # the commit spoke of another placement
            self._write_snapshots()
            self._go_on()

        self._schedule(Urgency.OPTIMIZER, work, f"{notice.run}:{notice.step}", run, self.now())

    def write_shards(self, notice: WriteShards) -> None:
        """Copy the state after a step, now or as soon as its optimizer has run."""
        if notice.writers[self.host.stage] == self.host.node:
            self.snapshots.append(notice)
            self._write_snapshots()

    def load(self, notice: LoadTraining) -> bool:
        """Whether this stage is told to load; its attempt is dropped then."""
        told = dict(zip(notice.nodes, notice.epochs, strict=True))
        if told.get(self.host.node) != self.host.epoch:
            return False
        self._forget()
        self.host.training = None
        return True

    # ---- frames
    def frame(
        self, frame: TrainingFrame, tensors: tuple[Tensor, ...], release: Callable[[], None], at: float
    ) -> None:
        """Take a neighbour's part of a step in progress; older ones are dropped, newer ones wait."""
        work = self.steps.get(frame.step)
        if work is not None and frame.attempt == self.attempt:
            self._take(work, frame, tensors, release, at)
        elif (frame.attempt, frame.step) <= (self.attempt, self._newest):
            release()
        else:
            self._ahead = [before for before in self._ahead if before.frame.attempt >= frame.attempt]
            self._ahead.append(Arrived(frame, tensors, release, at))

    def _take(
        self,
        work: StepWork,
        frame: TrainingFrame,
        tensors: tuple[Tensor, ...],
        release: Callable[[], None],
        at: float,
    ) -> None:
        match frame:
            case TrainForward():
                # the graph keeps hidden states until the backward: their buffer is given up, not given back
                work.rows[frame.microbatch] = Row(tensors[0], tensors[1], frame.lengths, at)
            case TrainBackward():
                work.returned[frame.microbatch] = Returned(tensors[0], release, at)
            case AddShardGradients():
                work.add_shard(frame.shard, [copy_on(tensor, self.host.device) for tensor in tensors])
                release()
            case AddTiedGradient():
                work.tied = copy_on(tensors[0], self.host.device)
                release()
        self._go_on()

    # ---- the course of the work
    def _go_on(self) -> None:
        """Conclude what is complete, and give the compute loop the next piece.

        In the steps' order: the last report of a step commits it, and no other call would commit one that was whole
        before the step before it.
        """
        is_next = True
        for work in list(self.steps.values()):
            if work.weights is None and self.host.training is not None:
                work.weights = self.host.training.weights_at(work.notice.weights)
            if is_next:
                self._exchange.conclude(work)
                is_next = work.total is not None
        if (piece := self._course.take(self._can_run, self._is_held_up)) is not None:
            if piece.work is Work.FORWARD:
                self._reserved[piece.step, piece.microbatch] = self._predicted_bytes(piece)
            self._schedule_piece(piece, self.steps[piece.step])

    def _can_run(self, piece: Piece) -> bool:
        work = self.steps[piece.step]
        return work.can_run(piece.work, piece.microbatch, is_last=self.host.is_last) and self._has_room(piece)

    def _is_held_up(self, piece: Piece) -> bool:
        return self.steps[piece.step].weights is None or not self._has_room(piece)

    def _has_room(self, piece: Piece) -> bool:
        """Whether what a forward will keep fits beside what is kept; one at a time always may."""
        limit = self.settings.activation_bytes
        if not limit or piece.work is not Work.FORWARD or not self._reserved:
            return True
        return sum(self._reserved.values()) + self._predicted_bytes(piece) <= limit

    def _predicted_bytes(self, piece: Piece) -> int:
        work = self.steps[piece.step]
        row = work.rows.get(piece.microbatch)
        if not self.settings.activation_bytes or row is None or work.weights is None:
            return 0
        return work.weights.activations.held(row.lengths, recompute=self.settings.recompute)

    def _schedule_piece(self, piece: Piece, work: StepWork) -> None:
        def run() -> Iterator[None]:
            for _ in self._compute(piece, work):
                yield
                if not self._is_current(work):
                    return
            self._course.end(piece)
            self._go_on()

        at = self.now()
        if piece.work is Work.FORWARD:
            at = work.rows[piece.microbatch].at
        elif (returned := work.returned.get(piece.microbatch)) is not None:
            at = returned.at
        name = f"{work.notice.run}:{piece.step}:{piece.microbatch}"
        self._schedule(URGENCY[piece.work], work, name, run, at, piece=piece)

    def _lengths(self, piece: Piece, work: StepWork) -> tuple[int, ...]:
        """The tokens of each example, where the piece is a whole pass."""
        match piece.work:
            case Work.FORWARD:
                return work.rows[piece.microbatch].lengths
            case Work.BACKWARD:
                return work.passes[piece.microbatch].row.lengths
            case _:
                return ()

    def _compute(self, piece: Piece, work: StepWork) -> Iterator[None]:
        if not self._is_current(work):
            return
        match piece.work:
            case Work.FORWARD:
                yield from self._forward(work, piece.microbatch)
            case Work.BACKWARD:
                yield from self._backward(work, piece.microbatch, is_whole=True)
                self._end_microbatch(work, piece.microbatch)
            case Work.INPUT_GRADIENT:
                yield from self._backward(work, piece.microbatch, is_whole=False)
            case Work.WEIGHT_GRADIENT:
                yield from work.passes[piece.microbatch].layers.weight_gradient()
                self._end_microbatch(work, piece.microbatch)

    def _forward(self, work: StepWork, microbatch: int) -> Iterator[None]:
        assert work.weights is not None
        host, row = self.host, work.rows.pop(microbatch)
        layers = self.layers_for(work.weights, row)
        yield from layers.forward(on_device(row.source, host.device))
        work.passes[microbatch] = MicrobatchPass(row, layers)
        if not host.is_last:
            frame = TrainForward(
                **address(host, work, host.stage + 1),
                microbatch=microbatch,
                version=self._version(work),
                lengths=row.lengths,
            )
            self.around.send(host, host.stage + 1, frame, (layers.output, row.targets_BT))

    def _backward(self, work: StepWork, microbatch: int, *, is_whole: bool) -> Iterator[None]:
        """At the last stage from the loss, else from what the next stage gave back; on to the stage before."""
        host, held = self.host, work.passes[microbatch]
        returned = work.returned.pop(microbatch, None)
        if returned is not None:
            gradient_BTD, held.release = on_device(returned.gradient_BTD, host.device), returned.release
        else:
            yield from self._head(work, microbatch, held)
            assert held.head is not None
            gradient_BTD = held.head.gradient_BTD
        layers = held.layers
        yield from layers.backward(gradient_BTD) if is_whole else layers.input_gradient(gradient_BTD)
        held.is_halfway = True
        if layers.gradient is not None:
            frame = TrainBackward(
                **address(host, work, host.stage - 1), microbatch=microbatch, version=self._version(work)
            )
            self.around.send(host, host.stage - 1, frame, (layers.gradient,))

    def _head(self, work: StepWork, microbatch: int, held: MicrobatchPass) -> Iterator[None]:
        assert work.weights is not None
        assert work.planned is not None
        held.head = self.head_for(work.weights, held)
        targets_BT = on_device(held.row.targets_BT, self.host.device)
        yield from held.head.run(targets_BT, work.planned.reference_tokens)
        work.note_losses(microbatch, held.head.losses)

    def _end_microbatch(self, work: StepWork, microbatch: int) -> None:
        """With the last microbatch of a shard, give its gradients to every member's same stage."""
        if not self._is_current(work):
            return
        held = work.passes[microbatch]
        held.release()
        del self._reserved[work.notice.step, microbatch]
        if held.head is not None:
            held.head.add_gradients()
        ended = work.end_microbatch(microbatch)
        if ended is None:
            return
        self._exchange.share(work, *ended)

    def _write_snapshots(self) -> None:
        state = self.host.training
        for notice in list(self.snapshots):
            if state is None:
                return
            wanted = Version(notice.lineage, notice.step)
            if state.version == wanted:
                self.snapshots.remove(notice)
                self.around.write_shard(self.host, notice, state.snapshot(optimizer=bool(notice.optimizer)))
            elif state.version > wanted:
                self.snapshots.remove(notice)  # the state was replaced: the operation chooses another writer

    def _forget(self) -> None:
        """Drop the attempt; a committed step's optimizer, if it hasn't run yet, has what it needs."""
        self.steps, self._reserved = {}, {}
        self._course.clear()
        if self.host.training is not None:
            self.host.training.drop_gradients()

    # ---- what computes: an emulated stage has others
    def layers_for(self, weights: Weights, row: Row) -> LayerPass:
        """A microbatch's way through the layers."""
        return LayerPass(weights.parts, row.lengths, recompute=self.settings.recompute)

    def head_for(self, weights: Weights, held: MicrobatchPass) -> HeadPass:
        """Its way through the head."""
        return HeadPass(weights.model, held.layers.output, held.row.lengths)

    # ---- small parts
    def _is_current(self, work: StepWork) -> bool:
        return self.steps.get(work.notice.step) is work

    def _version(self, work: StepWork) -> str:
        return f"{work.notice.lineage}.{work.notice.weights}"

    def _schedule(
        self,
        urgency: Urgency,
        work: StepWork,
        item: str,
        run: Callable[[], Iterator[None]],
        at: float,
        *,
        piece: Piece | None = None,
    ) -> None:
        def failed(error: Exception) -> None:
            log.error(
                "training_failed", item=item, node=self.host.node, stage=self.host.stage, reason=str(error)
            )
            raise error

        self.around.schedule(
            Task(
                urgency=urgency,
                node=self.host.node,
                stage=self.host.stage,
                item=item,
                version=self._version(work),
                ready_at=at,
                run=run,
                failed=failed,
                rank=piece.rank if piece else 0,
                lengths=self._lengths(piece, work) if piece else (),
            )
        )
