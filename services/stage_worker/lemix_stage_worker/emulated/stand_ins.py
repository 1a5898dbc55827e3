"""What an emulated stage has in place of weights, passes and a training state: the same names, and no numbers.

Frames carry zeros, one a token, where a real stage's carry hidden states: as many messages as ever, with hardly any
bytes. A gradient is one zero. A stored version is one small tensor a stage that says which step it is of, so that equal
versions have equal hashes on every node, and other versions other ones; they are no hashes of weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from torch import Tensor, nn

from lemix_common.store.training import PlannedStep
from lemix_stage_worker.activation_memory import StageActivations
from lemix_stage_worker.emulated.emulation import Emulation, safepoints
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.model.skeleton import HEAD_WEIGHT
from lemix_stage_worker.trained_weights import Weights
from lemix_stage_worker.training_state import TrainingState

_LEARN: Final = 0.1
_MOST_BEHIND_S: Final = 0.002
"""What took longer was somebody else's turn on the processor."""


def nothing_computed(num_tokens: int) -> Tensor:
    """What goes to the next stage in place of hidden_BTD, or back in place of its gradient."""
    return torch.zeros(1, num_tokens, 1)


@dataclass
class Waiter:
    """Spends the time that an accelerator would. What this process takes itself is part of it, as far as it fits."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    behind_s: float = 0.0
    """What was lately done behind a wait, before its piece of work had ended: messages."""

    def until(self, end: float) -> None:
        """Wait until what is done behind the wait will end at a time of `now`."""
        if (left := end - self.behind_s - self.now()) > 0:
            self.sleep(left)

    def done(self, waited_until: float) -> None:
        """All that belongs to the piece of work is done."""
        self.behind_s += _LEARN * (min(self.now() - waited_until, _MOST_BEHIND_S) - self.behind_s)

    def spend(self, seconds: float) -> Iterator[None]:
        """Be busy for so long, with safepoints at which something else may come first.

        A look at what has arrived there is part of the work.
        """
        owed_s, looked_since = 0.0, -math.inf
        for part_s in safepoints(seconds):
            began = self.now()
            if began - looked_since <= _MOST_BEHIND_S:
                began = looked_since
            if (wait_s := began + part_s - owed_s - self.now()) > 0:
                self.sleep(wait_s)
            looked_since = self.now()
            owed_s = max(0.0, owed_s + looked_since - began - part_s)
            yield


@dataclass(eq=False)
class EmulatedStage(HostedStage):
    """A stage without weights."""

    emulation: Emulation = field(kw_only=True)

    @property
    def memory_bytes(self) -> int:
        """What the real one would take: its versions, and what training adds."""
        costs = self.emulation.profile.stages[self.stage]
        state = self.training
        trained = costs.training_bytes if state is not None else 0
        kept = 1 if state is not None and state.older is not None else 0
        return costs.weight_bytes * (len(self.versions) + kept) + trained


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedActivations(StageActivations):
    """What the profile says of them."""

    emulation: Emulation
    stage: int

    def held(self, lengths: Sequence[int], *, recompute: bool = False) -> int:  # noqa: ARG002 - profiles keep all
        """Bytes of a microbatch on its way."""
        return self.emulation.activation_bytes(self.stage, lengths)


@dataclass(eq=False)
class EmulatedWeights(Weights):
    """A parameter or two, which stay as they are: where they have gradients, there was something to learn.

    At the ends they have the names of the embedding and the head, which exchange their gradients if they are one.
    """

    emulation: Emulation = field(kw_only=True)
    stage: int = field(kw_only=True)
    embedding_name: str = field(kw_only=True)

    def __post_init__(self) -> None:
        self.parts = ()
        self.is_half = False
        names = [self.embedding_name] if self.model.is_first else []
        names += [HEAD_WEIGHT] if self.model.is_last else []
        self._leaves = {name: nn.Parameter(torch.zeros(1)) for name in names or ["emulated"]}

    @cached_property
    def activations(self) -> StageActivations:
        """As the profile says."""
        return EmulatedActivations(
            layers=(),
            output_per_token=0,
            largest_gradient=0,
            head_row=0,
            head_gradient=0,
            emulation=self.emulation,
            stage=self.stage,
        )

    def leaves(self) -> dict[str, nn.Parameter]:
        """By name."""
        return self._leaves


@dataclass(eq=False)
class EmulatedTraining(TrainingState):
    """A step's number, and the time that an optimizer takes."""

    emulation: Emulation = field(kw_only=True)
    stage: int = field(kw_only=True)
    waiter: Waiter = field(kw_only=True)

    def apply(self, gradients: Mapping[str, Tensor], planned: PlannedStep, *, scale: float) -> Iterator[None]:
        """Wait if there is something to learn, then be a step further."""
        if gradients:
            yield from self.waiter.spend(self.emulation.optimizer_s(self.stage))
        yield from super().apply({}, planned, scale=scale)

    def snapshot(self, *, optimizer: bool) -> dict[str, Tensor]:  # noqa: ARG002 - there is no optimizer's state
        """What is stored of a version."""
        return {f"emulated.{self.stage}": torch.tensor([self.lineage, self.step])}


@dataclass(eq=False)
class EmulatedLayers(LayerPass):
    """A microbatch that takes its time."""

    forward_s: float = field(kw_only=True)
    backward_s: float = field(kw_only=True)
    is_first: bool = field(kw_only=True)
    waiter: Waiter = field(kw_only=True)

    def forward(self, source: Tensor) -> Iterator[None]:  # noqa: ARG002 - nothing is computed from it
        """Wait."""
        yield from self.waiter.spend(self.forward_s)
        self._output = nothing_computed(sum(self.lengths))

    def backward(self, gradient_BTD: Tensor) -> Iterator[None]:  # noqa: ARG002 - nor of it
        """Wait."""
        yield from self.waiter.spend(self.backward_s)
        self.gradient = None if self.is_first else nothing_computed(sum(self.lengths))

    def input_gradient(self, gradient_BTD: Tensor) -> Iterator[None]:  # noqa: ARG002 - nor of it
        """Wait for half of the backward's time."""
        yield from self.waiter.spend(self.backward_s / 2)
        self.gradient = None if self.is_first else nothing_computed(sum(self.lengths))

    def weight_gradient(self) -> Iterator[None]:
        """Wait for the other half."""
        yield from self.waiter.spend(self.backward_s / 2)


@dataclass(eq=False)
class EmulatedHead(HeadPass):
    """A loss that says nothing: that of somebody who takes all tokens for as likely."""

    logprob: float = field(kw_only=True)

    def run(self, targets_BT: Tensor, num_targets: int) -> Iterator[None]:
        """Each example's share of it."""
        counts = [int((part != NO_TARGET).sum()) for part in torch.split(targets_BT[0], list(self.lengths))]
        self.losses = tuple(-self.logprob * count / num_targets for count in counts)
        yield from ()

    def add_gradients(self) -> None:
        """None."""
