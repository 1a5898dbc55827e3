"""Training steps on one stage: microbatches forward and backward, shards' sums, commit, optimizer.

A step is computed in attempts. An attempt's gradients are kept until it commits or another attempt begins; the
optimizer runs only when the control stream says that the step is committed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor

from lemix_common.messages import (
    AddShardGradients,
    AddTiedGradient,
    Frame,
    LoadTraining,
    RunStep,
    StepCommitted,
    TrainBackward,
    TrainForward,
    WriteShards,
)
from lemix_common.store.training import GradientReport, PlannedStep
from lemix_stage_worker.gradients import ShardSum
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.ready_queue import Task, Urgency

log = structlog.get_logger()

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and reference."""
TrainingFrame = TrainForward | TrainBackward | AddShardGradients | AddTiedGradient
TIED_HEAD = "lm_head.weight"


class TrainingSurroundings(Protocol):
    """What training needs of the worker around it."""

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node."""

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """To the same stage of another node."""

    def schedule(self, task: Task) -> None:
        """Let the compute loop run a step when it is its turn."""

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Report this stage's gradients."""

    def training_at(self, host: HostedStage, step: int) -> None:
        """Report where this stage's training state is."""

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Make a snapshot durable in the background."""

    def fetch_step(self, host: HostedStage, step: int, attempt: int, microbatches_of: int | None) -> None:
        """Read a planned step (and, at stage 0, this node's examples) in the background."""


@dataclass(eq=False)
class Attempt:
    """One try to compute a step, on one stage."""

    notice: RunStep
    planned: PlannedStep | None = None
    examples: dict[int, Example] = field(default_factory=dict)
    """At stage 0: this node's, by microbatch."""
    waiting: list[int] = field(default_factory=list)
    """Microbatches of stage 0 not begun yet."""
    in_flight: dict[int, LayerPass | None] = field(default_factory=dict)
    """Microbatches between the begin of their forward and the end of their backward."""
    left: dict[int, int] = field(default_factory=dict)
    """This node's shards to the microbatches whose backward is still to come."""
    losses: dict[int, float] = field(default_factory=dict)
    culprits: set[int] = field(default_factory=set)
    """Microbatches whose loss isn't finite."""
    suspects: set[int] = field(default_factory=set)
    """Microbatches of shards whose gradient isn't finite."""
    sums: ShardSum | None = None
    tied: Tensor | None = None
    """The other end's gradient of a tied embedding."""
    total: dict[str, Tensor] | None = None
    """What the optimizer takes, once every shard is in."""
    sent_tied: bool = False
    early: list[tuple[TrainingFrame, tuple[Tensor, ...], Callable[[], None], float]] = field(
        default_factory=list
    )
    """Frames that arrived before the step was read or the version was resident."""


@dataclass
class Learner:
    """One stage's training. Owned by the compute loop."""

    host: HostedStage
    around: TrainingSurroundings
    now: Callable[[], float]
    attempt: Attempt | None = None
    ahead: list[tuple[TrainingFrame, tuple[Tensor, ...], Callable[[], None], float]] = field(
        default_factory=list
    )
    """Frames of an attempt whose notice hasn't been read yet."""
    snapshots: list[WriteShards] = field(default_factory=list)

    # ---- notices
    def run_step(self, notice: RunStep) -> None:
        """Begin an attempt; whatever an earlier one computed is dropped."""
        node = self.host.node
        self._drop_graphs()
        self.attempt = None
        if node not in notice.members or notice.epochs[notice.members.index(node)] != self.host.epoch:
            return
        self.attempt = Attempt(notice)
        self.around.fetch_step(self.host, notice.step, notice.attempt, node if self.host.is_first else None)
        arrived, self.ahead = self.ahead, []
        for entry in arrived:
            self.frame(*entry)

    def step_fetched(
        self, attempt_number: int, planned: PlannedStep, examples: Mapping[int, Example]
    ) -> None:
        """The step's plan is here: its microbatches can begin."""
        attempt = self.attempt
        if attempt is None or attempt.notice.attempt != attempt_number:
            return
        attempt.planned = planned
        mine = self._mine(attempt)
        attempt.examples, attempt.waiting = dict(examples), list(mine)
        for microbatch in mine:
            shard = planned.shards[microbatch]
            attempt.left[shard] = attempt.left.get(shard, 0) + 1
        attempt.sums = ShardSum(sorted({planned.shards[microbatch] for microbatch in planned.microbatches}))
        self._go_on()

    def step_committed(self, notice: StepCommitted) -> None:
        """Run the optimizer on the gradients this stage reported."""
        attempt, state = self.attempt, self.host.training
        if (
            attempt is None
            or attempt.notice.attempt != notice.attempt
            or attempt.total is None
            or state is None
        ):
            return
        planned, total = attempt.planned, attempt.total
        assert planned is not None
        epoch = attempt.notice.epochs[attempt.notice.members.index(self.host.node)]

        def run() -> Iterator[None]:
            yield from state.apply(total, planned, scale=notice.scale)
            log.info(
                "optimizer_stepped",
                run=notice.run,
                step=notice.step,
                node=self.host.node,
                stage=self.host.stage,
            )
            self.attempt = None if self.attempt is attempt else self.attempt
            if (
                epoch != self.host.epoch and self.host.training is state
            ):  # the commit spoke of another placement
                self.around.training_at(self.host, state.step)
            self._write_snapshots()
            self._go_on()

        self._schedule(Urgency.OPTIMIZER, f"{notice.run}:{notice.step}", run)

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
        self._drop_graphs()
        self.attempt, self.host.training = None, None
        return True

    # ---- frames
    def frame(
        self, frame: TrainingFrame, tensors: tuple[Tensor, ...], release: Callable[[], None], at: float
    ) -> None:
        """Take a neighbour's part of the attempt in progress; older ones are dropped, newer ones wait."""
        current = self.attempt.notice.attempt if self.attempt else -1
        if frame.attempt > current:
            self.ahead = [entry for entry in self.ahead if entry[0].attempt >= frame.attempt]
            self.ahead.append((frame, tensors, release, at))
        elif frame.attempt < current or self.attempt is None:
            release()
        elif not self._can_compute(self.attempt):
            self.attempt.early.append((frame, tensors, release, at))
        else:
            self._take(self.attempt, frame, tensors, release, at)

    def _take(
        self,
        attempt: Attempt,
        frame: TrainingFrame,
        tensors: tuple[Tensor, ...],
        release: Callable[[], None],
        at: float,
    ) -> None:
        match frame:
            case TrainForward():
                self._schedule_forward(attempt, frame.microbatch, tensors[0], tensors[1], at)
            case TrainBackward():
                self._schedule_backward(attempt, frame.microbatch, tensors[0], release, at)
            case AddShardGradients():
                self._add_shard(attempt, frame.shard, [tensor.clone() for tensor in tensors])
                release()
            case AddTiedGradient():
                attempt.tied = tensors[0].clone()
                release()
                self._conclude(attempt)

    # ---- the attempt's course
    def _mine(self, attempt: Attempt) -> list[int]:
        assert attempt.planned is not None
        return [
            microbatch
            for microbatch in attempt.planned.microbatches
            if attempt.notice.shard_nodes[attempt.planned.shards[microbatch]] == self.host.node
        ]

    def _can_compute(self, attempt: Attempt) -> bool:
        state = self.host.training
        return attempt.planned is not None and state is not None and state.step == attempt.notice.step - 1

    def _go_on(self) -> None:
        attempt = self.attempt
        if attempt is None or not self._can_compute(attempt):
            return
        early, attempt.early = attempt.early, []
        for entry in early:
            self._take(attempt, *entry)
        if self.host.is_first:
            while attempt.waiting and len(attempt.in_flight) < self.host.stages:
                self._begin(attempt, attempt.waiting.pop(0))
        if not self._mine(attempt):
            self._conclude(attempt)

    def _begin(self, attempt: Attempt, microbatch: int) -> None:
        prompt, reference = attempt.examples.pop(microbatch)
        ids_BT = torch.tensor([[*prompt, *reference]])
        targets_BT = torch.tensor([[*[NO_TARGET] * (len(prompt) - 1), *reference, NO_TARGET]])
        attempt.in_flight[microbatch] = None  # its place among those in flight
        self._schedule_forward(attempt, microbatch, ids_BT, targets_BT, self.now())

    def _schedule_forward(
        self, attempt: Attempt, microbatch: int, source: Tensor, targets_BT: Tensor, at: float
    ) -> None:
        """The graph keeps hidden states until the backward, so their buffer is given up, not given back."""
        self._schedule(
            Urgency.FORWARD,
            self._name(attempt, microbatch),
            lambda: self._forward(attempt, microbatch, source, targets_BT),
            at,
        )

    def _forward(
        self, attempt: Attempt, microbatch: int, source: Tensor, targets_BT: Tensor
    ) -> Iterator[None]:
        host, state = self.host, self.host.training
        if self.attempt is not attempt or state is None:
            return
        layers = LayerPass(state.parts)
        for _ in layers.forward(source):
            yield
            if self.attempt is not attempt:
                return
        attempt.in_flight[microbatch] = layers
        if host.is_last:
            name = self._name(attempt, microbatch)
            self._schedule(Urgency.BACKWARD, name, lambda: self._head(attempt, microbatch, targets_BT))
        else:
            frame = TrainForward(
                **self._about(attempt, host.stage + 1), microbatch=microbatch, version=self._version(attempt)
            )
            self.around.send(host, host.stage + 1, frame, (layers.output, targets_BT))

    def _head(self, attempt: Attempt, microbatch: int, targets_BT: Tensor) -> Iterator[None]:
        """The loss, and the way back through this stage's layers."""
        state, layers = self.host.training, attempt.in_flight.get(microbatch)
        if self.attempt is not attempt or state is None or layers is None or attempt.planned is None:
            return
        head = HeadPass(state.model, layers.output)
        for _ in head.run(targets_BT, attempt.planned.reference_tokens):
            yield
            if self.attempt is not attempt:
                return
        attempt.losses[microbatch] = head.loss
        if not math.isfinite(head.loss):
            attempt.culprits.add(microbatch)
        yield from self._backward(attempt, microbatch, head.gradient_BTD, _nothing)

    def _schedule_backward(
        self, attempt: Attempt, microbatch: int, gradient_BTD: Tensor, release: Callable[[], None], at: float
    ) -> None:
        self._schedule(
            Urgency.BACKWARD,
            self._name(attempt, microbatch),
            lambda: self._backward(attempt, microbatch, gradient_BTD, release),
            at,
        )

    def _backward(
        self, attempt: Attempt, microbatch: int, gradient_BTD: Tensor, release: Callable[[], None]
    ) -> Iterator[None]:
        host, state, layers = self.host, self.host.training, attempt.in_flight.get(microbatch)
        if self.attempt is not attempt or state is None or layers is None or attempt.planned is None:
            return
        for _ in layers.backward(gradient_BTD):
            yield
            if self.attempt is not attempt:
                return
        release()
        del attempt.in_flight[microbatch]
        if layers.gradient is not None:
            frame = TrainBackward(
                **self._about(attempt, host.stage - 1), microbatch=microbatch, version=self._version(attempt)
            )
            self.around.send(host, host.stage - 1, frame, (layers.gradient,))
        shard = attempt.planned.shards[microbatch]
        attempt.left[shard] -= 1
        if not attempt.left[shard]:
            self._share(attempt, shard, state.take_gradients())
        self._go_on()

    def _share(self, attempt: Attempt, shard: int, gradients: list[Tensor]) -> None:
        """Give a finished shard's gradients to every member's same stage."""
        notice = attempt.notice
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            assert attempt.planned is not None
            shards = attempt.planned.shards
            attempt.suspects |= {index for index in self._mine(attempt) if shards[index] == shard}
        for node, epoch in zip(notice.members, notice.epochs, strict=True):
            if node != self.host.node:
                frame = AddShardGradients(
                    node=node,
                    stage=self.host.stage,
                    epoch=epoch,
                    run=notice.run,
                    step=notice.step,
                    attempt=notice.attempt,
                    shard=shard,
                )
                self.around.send_to_node(node, epoch, frame, gradients)
        self._add_shard(attempt, shard, gradients)

    def _add_shard(self, attempt: Attempt, shard: int, gradients: list[Tensor]) -> None:
        assert attempt.sums is not None
        attempt.sums.add(shard, gradients)
        self._conclude(attempt)

    def _conclude(self, attempt: Attempt) -> None:
        """With every shard in (and a tied embedding's other half), report the gradients."""
        assert attempt.sums is not None
        summed, state = attempt.sums.total, self.host.training
        if summed is None or attempt.total is not None or state is None:
            return
        gradients = dict(zip(state.model.leaves(), summed, strict=True)) if summed else {}
        if not self._with_tied(attempt, gradients):
            return
        attempt.total = gradients
        squares = state.squares(gradients)
        is_finite = not (attempt.culprits or attempt.suspects) and all(map(math.isfinite, squares))
        report = GradientReport(
            losses=attempt.losses if is_finite else {},
            squares=squares if is_finite else (),
            culprits=tuple(sorted(attempt.culprits)),
            suspects=tuple(sorted(attempt.suspects)),
            is_finite=is_finite,
        )
        self.around.gradients_ready(self.host, attempt.notice.step, attempt.notice.attempt, report)

    def _with_tied(self, attempt: Attempt, gradients: dict[str, Tensor]) -> bool:
        """Sum a tied embedding's two gradients, embedding first; False while the other one isn't here."""
        host = self.host
        if not gradients or not host.source.is_tied or not (host.is_first or host.is_last):
            return True
        embedding = host.source.embedding_name
        if host.stages == 1:
            gradients[embedding] = gradients[embedding] + gradients.pop(TIED_HEAD)
            return True
        own, other_stage = (embedding, host.stages - 1) if host.is_first else (TIED_HEAD, 0)
        if not attempt.sent_tied:
            attempt.sent_tied = True
            self.around.send(
                host, other_stage, AddTiedGradient(**self._about(attempt, other_stage)), (gradients[own],)
            )
        if attempt.tied is None:
            return False
        first, last = (gradients[own], attempt.tied) if host.is_first else (attempt.tied, gradients[own])
        gradients[own] = first + last
        return True

    def _write_snapshots(self) -> None:
        state = self.host.training
        for notice in list(self.snapshots):
            if state is not None and state.step == notice.step:
                self.snapshots.remove(notice)
                self.around.write_shard(self.host, notice, state.snapshot(optimizer=bool(notice.optimizer)))
            elif state is not None and state.step > notice.step:
                self.snapshots.remove(notice)  # the state was replaced: the operation chooses another writer

    def _drop_graphs(self) -> None:
        if self.host.training is not None:
            for parameter in self.host.training.model.leaves().values():
                parameter.grad = None

    # ---- small parts
    def _about(self, attempt: Attempt, stage: int) -> dict[str, Any]:
        notice = attempt.notice
        return {
            "node": self.host.node,
            "stage": stage,
            "epoch": self.host.epoch,
            "run": notice.run,
            "step": notice.step,
            "attempt": notice.attempt,
        }

    def _version(self, attempt: Attempt) -> str:
        return f"{attempt.notice.lineage}.{attempt.notice.step - 1}"

    def _name(self, attempt: Attempt, microbatch: int) -> str:
        return f"{attempt.notice.run}:{attempt.notice.step}:{microbatch}"

    def _schedule(
        self, urgency: Urgency, item: str, run: Callable[[], Iterator[None]], at: float | None = None
    ) -> None:
        attempt = self.attempt
        version = self._version(attempt) if attempt is not None else ""

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
                version=version,
                ready_at=self.now() if at is None else at,
                run=run,
                failed=failed,
            )
        )


def _nothing() -> None:
    """No pooled buffer to give back."""
