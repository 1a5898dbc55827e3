"""One version of a stage's weights, to compute a training step on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lemix_stage_worker.activation_memory import StageActivations, measure_activations
from lemix_stage_worker.model.stage import StageModel

HALF = frozenset({torch.bfloat16, torch.float16})
"""Types too short to add many gradients up in, or to keep a small update."""


@dataclass(eq=False)
class Weights:
    """A stage's parameters as leaves that gradients accumulate in, and its layers one by one over the same values."""

    model: StageModel
    is_shared: bool = False
    """With a served version: it may be read, not written."""
    _sums: dict[str, Tensor] = field(default_factory=dict)
    """In half precision: the gradients of the microbatches before, in float32."""

    def __post_init__(self) -> None:
        self.parts = self.model.parts()
        self.is_half = any(leaf.dtype in HALF for leaf in self.leaves().values())

    @cached_property
    def activations(self) -> StageActivations:
        """What the stage keeps of microbatches, measured once by short probes."""
        return measure_activations(self.model)

    def leaves(self) -> dict[str, nn.Parameter]:
        """The parameters by leaf name, in model order."""
        return self.model.leaves()

    def empty_copy(self) -> Weights:
        """The same stage with memory of its own, for values to be written to."""
        model = self.model.shell()
        sources = {leaf.source: leaf.parameter.detach() for leaf in self.model.all_leaves()}
        model.load({name: torch.empty_like(values) for name, values in sources.items()})
        return Weights(model)

    def end_microbatch(self) -> None:
        """Everything that one microbatch adds to the gradients is there."""
        if not self.is_half:
            return
        for name, parameter in self.leaves().items():
            if parameter.grad is not None:
                before, gradient = self._sums.get(name), parameter.grad.float()
                self._sums[name] = gradient if before is None else before.add_(gradient)
                parameter.grad = None

    def take_gradients(self) -> list[Tensor]:
        """The gradients accumulated since the last call, in model order, zeros where none came."""
        found: Mapping[str, Tensor | None] = (
            self._sums if self.is_half else {name: leaf.grad for name, leaf in self.leaves().items()}
        )
        dtype = torch.float32 if self.is_half else None
        gradients = []
        for name, leaf in self.leaves().items():
            gradient = found.get(name)
            gradients.append(torch.zeros_like(leaf, dtype=dtype) if gradient is None else gradient)
        self.drop_gradients()
        return gradients

    def drop_gradients(self) -> None:
        """Forget what has accumulated."""
        self._sums = {}
        for leaf in self.leaves().values():
            leaf.grad = None
