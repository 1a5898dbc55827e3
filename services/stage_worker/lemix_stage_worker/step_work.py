"""What one stage knows of one training step in progress: its plan, its microbatches, its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemix_common.messages import RunStep
from lemix_common.schedules import Work
from lemix_common.store.training import GradientReport, PlannedStep
from lemix_stage_worker.gradients import ShardSum
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.trained_weights import Weights

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and reference."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A microbatch on its way forward: its examples one behind the other, without padding."""

    source: Tensor
    """ids_BT or hidden_BTD."""
    targets_BT: Tensor
    lengths: tuple[int, ...]
    at: float
    """When it arrived."""


@dataclass(frozen=True, slots=True, eq=False)
class Returned:
    """The gradient of a microbatch's output, from the next stage."""

    gradient_BTD: Tensor
    release: Callable[[], None]
    at: float


@dataclass(eq=False)
class MicrobatchPass:
    """A microbatch between its forward and its last gradient on this stage."""

    row: Row
    layers: LayerPass
    head: HeadPass | None = None
    release: Callable[[], None] = lambda: None
    """Gives back the buffer of what was returned; the gradients of weights still read it."""
    is_halfway: bool = False
    """Only the gradients of the weights are left."""


@dataclass(eq=False)
class StepWork:
    """One step in one attempt, on one stage."""

    notice: RunStep
    node: int
    is_alone: bool = False
    """The node learns from its own microbatches only."""
    planned: PlannedStep | None = None
    mine: tuple[int, ...] = ()
    """The microbatches that this node computes."""
    weights: Weights | None = None
    """What they are computed on, once that is here."""
    rows: dict[int, Row] = field(default_factory=dict)
    """Microbatches whose forward can begin."""
    returned: dict[int, Returned] = field(default_factory=dict)
    """Microbatches whose backward can begin."""
    passes: dict[int, MicrobatchPass] = field(default_factory=dict)
    tied: Tensor | None = None
    """The other end's gradient of a tied embedding."""
    sent_tied: bool = False
    total: dict[str, Tensor] | None = None
    """What the optimizer takes, once every shard is in."""
    _left: dict[int, int] = field(default_factory=dict)
    """This node's shards to the microbatches that still have gradients to come."""
    _sums: ShardSum | None = None
    _early: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    """Other nodes' shards that came before the plan."""
    _losses: dict[int, float] = field(default_factory=dict)
    """By example."""
    _suspects: set[int] = field(default_factory=set)
    """Of a step taken apart: examples whose gradient isn't finite. Else only the sum is looked at, which is cheap."""

    def plan(self, planned: PlannedStep, examples: Mapping[int, Sequence[Example]], at: float) -> None:
        """Take the step's plan and, at stage 0, the examples of this node's microbatches."""
        self.planned = planned
        self.mine = microbatches_of(planned, self.notice, self.node)
        self.rows |= {microbatch: pack(some, at) for microbatch, some in examples.items()}
        for microbatch in self.mine:
            shard = planned.shards[microbatch]
            self._left[shard] = self._left.get(shard, 0) + 1
        summed = self.mine if self.is_alone else planned.microbatches
        self._sums = ShardSum(sorted({planned.shards[microbatch] for microbatch in summed}))
        for shard, gradients in self._early:
            self._sums.add(shard, gradients)
        self._early = []

    def can_run(self, work: Work, microbatch: int, *, is_last: bool) -> bool:
        """Whether everything is here that an action needs."""
        held = self.passes.get(microbatch)
        match work:
            case Work.FORWARD:
                return self.weights is not None and microbatch in self.rows
            case Work.WEIGHT_GRADIENT:
                return held is not None and held.is_halfway
            case _:
                return held is not None and (is_last or microbatch in self.returned)

    def note_losses(self, microbatch: int, losses: Sequence[float]) -> None:
        """What each example of a microbatch adds to the step's loss."""
        assert self.planned is not None
        self._losses |= zip(self.planned.examples_of(microbatch), losses, strict=True)

    def end_microbatch(self, microbatch: int) -> tuple[int, list[Tensor]] | None:
        """All its gradients are there; with the last of its shard, the shard and the shard's gradients."""
        assert self.planned is not None
        assert self.weights is not None
        del self.passes[microbatch]
        self.weights.end_microbatch()
        shard = self.planned.shards[microbatch]
        self._left[shard] -= 1
        if self._left[shard]:
            return None
        gradients = self.weights.take_gradients()
        if self.planned.is_apart and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self._suspects.update(self.planned.examples_of(microbatch))
        return shard, gradients

    def add_shard(self, shard: int, gradients: list[Tensor]) -> None:
        """A shard's gradients, from here or from another node."""
        if self._sums is None:
            self._early.append((shard, gradients))
        else:
            self._sums.add(shard, gradients)

    @property
    def summed(self) -> list[Tensor] | None:
        """The sum over all shards, once they are all there; empty if there was nothing to compute."""
        return self._sums.total if self._sums is not None else None

    def report(self, squares: tuple[float, ...]) -> GradientReport:
        """What this stage says of its gradients."""
        culprits = sorted(example for example, loss in self._losses.items() if not math.isfinite(loss))
        is_finite = not (culprits or self._suspects) and all(map(math.isfinite, squares))
        return GradientReport(
            losses=self._losses if is_finite else {},
            squares=squares if is_finite else (),
            culprits=tuple(culprits),
            suspects=tuple(sorted(self._suspects)),
            is_finite=is_finite,
        )


def microbatches_of(planned: PlannedStep, notice: RunStep, node: int) -> tuple[int, ...]:
    """The microbatches of a step that a node computes, rising."""
    return tuple(
        microbatch
        for microbatch in planned.microbatches
        if notice.shard_nodes[planned.shards[microbatch]] == node
    )


def pack(examples: Sequence[Example], at: float) -> Row:
    """Several examples as one row; the last token of each predicts nothing."""
    ids: list[int] = []
    targets: list[int] = []
    for prompt, reference in examples:
        ids += (*prompt, *reference)
        targets += (*[NO_TARGET] * (len(prompt) - 1), *reference, NO_TARGET)
    lengths = tuple(len(prompt) + len(reference) for prompt, reference in examples)
    return Row(torch.tensor([ids]), torch.tensor([targets]), lengths, at)
