"""One microbatch's way through a stage's layers and back, with a safepoint at every border.

One call of autograd's backward can't be interrupted. So the borders between layers are detached: each layer has a
graph of its own, and between any two the compute loop may serve a request. The numbers are those of one graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemix_stage_worker.model.scoring import loss_sum, target_rows
from lemix_stage_worker.model.stage import StageModel

HEAD_ROWS = 256
"""Positions whose logits are computed at a time: they are the largest tensor of a step."""


@dataclass(eq=False)
class LayerPass:
    """A microbatch between its forward and its backward: the input and output of every layer."""

    parts: Sequence[StageModel]
    borders: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradient: Tensor | None = None
    """After the backward, that of the stage's input; None at the embedding."""

    @property
    def output(self) -> Tensor:
        """What the last layer computed: hidden_BTD."""
        return self.borders[-1][1]

    def forward(self, source: Tensor) -> Iterator[None]:
        """Run the layers on ids_BT or hidden_BTD; yields after each."""
        positions_T = torch.arange(source.shape[1])
        for part in self.parts:
            source = source.detach()
            if source.is_floating_point():
                source.requires_grad_()
            output = part(source, positions_T)
            self.borders.append((source, output))
            source = output
            yield

    def backward(self, gradient_BTD: Tensor) -> Iterator[None]:
        """Run them backwards, accumulating the parameters' gradients; yields after each layer."""
        self.gradient = gradient_BTD
        while self.borders:
            source, output = self.borders.pop()
            torch.autograd.backward(output, self.gradient)
            self.gradient = source.grad
            yield


@dataclass(eq=False)
class HeadPass:
    """The head on a microbatch: its loss, and the gradient of the hidden states that reach it."""

    model: StageModel
    hidden_BTD: Tensor
    loss: float = 0.0

    def run(self, targets_BT: Tensor, num_targets: int) -> Iterator[None]:
        """Loss (a mean over ``num_targets``) and backward, some positions at a time; yields after each."""
        self.hidden_BTD = self.hidden_BTD.detach().requires_grad_()
        for rows_R in target_rows(targets_BT[0], max_rows=HEAD_ROWS):
            loss = loss_sum(self.model, self.hidden_BTD[0][rows_R], targets_BT[0][rows_R]) / num_targets
            torch.autograd.backward(loss)
            self.loss += float(loss.detach())
            yield

    @property
    def gradient_BTD(self) -> Tensor:
        """Of the hidden states; zeros where nothing was asked."""
        gradient = self.hidden_BTD.grad
        return torch.zeros_like(self.hidden_BTD) if gradient is None else gradient
