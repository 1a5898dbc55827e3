"""One microbatch's way through a stage's layers and back, with a safepoint at every border.

One call of autograd's backward can't be interrupted. So the borders between layers are detached: each layer has a
graph of its own, and between any two the compute loop may serve a request. The numbers are those of one graph: also of
a backward in two halves (see `split_backward`), and of one that computes a layer again instead of keeping it.

A microbatch is one row of several examples, one after the other without padding. Each has positions of its own and
attends to itself only (see `model.attention`), so what is computed for it is what is computed for it alone; only the
parameters' gradients, which are sums over the row, may round differently.

The head is passed in chunks, each with a backward of its own. A microbatch with more targets than fit one chunk adds
the head's gradient up chunk by chunk, which rounds differently from one graph; the same way in every schedule and cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemix_stage_worker.model.layer_call import LayerCall, kind_of, listen
from lemix_stage_worker.model.scoring import target_rows, token_logprobs
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.split_backward import WeightNotes

HEAD_ROWS = 256
"""Positions whose logits are computed at a time: they are the largest tensor of a step."""


@dataclass(eq=False)
class LayerGraph:
    """One layer's part in a pass: its graph, from its forward to its last gradient."""

    part: StageModel
    source: Tensor
    """Of its own, where the borders are detached."""
    positions_T: Tensor
    call: LayerCall | None = None
    """How the layer is called, once that is known."""
    notes: WeightNotes = field(default_factory=WeightNotes)
    output: Tensor | None = None
    """With its graph; None while there is none."""

    def compute(self) -> Tensor:
        """The output, keeping its graph."""
        with self.notes:
            self.output = self._run()
        return self.output

    def compute_only(self) -> Tensor:
        """The output without a graph."""
        with torch.no_grad():
            return self._run()

    def input_gradient(self, gradient_BTD: Tensor) -> Tensor | None:
        """The input's gradient, without the parameters'; None at the embedding."""
        assert self.output is not None
        output, self.output = self.output, None
        return self.notes.input_gradient(output, gradient_BTD, self.source, self.part.base.parameters())

    def weight_gradient(self) -> None:
        """Accumulate the parameters' gradients."""
        self.notes.add_up()

    def _run(self) -> Tensor:
        if self.call is not None and not self.part.is_first:
            return self.call(self.part, self.source)
        output, self.call = listen(self.part, self.source, self.positions_T)
        return output


@dataclass(eq=False)
class LayerPass:
    """A microbatch between its forward and its last gradient."""

    parts: Sequence[StageModel]
    lengths: tuple[int, ...] = ()
    """The tokens of each example in the row; empty: the row is one example."""
    recompute: bool = False
    """Keep only each layer's input, and compute the layer again when its gradients are asked for."""
    gradient: Tensor | None = None
    """After `backward` or `input_gradient`, that of the stage's input; None at the embedding."""
    _output: Tensor | None = None
    _graphs: list[LayerGraph] = field(default_factory=list)
    """Those still to go back through, the last of them next."""
    _halves: deque[LayerGraph] = field(default_factory=deque)
    """Those whose second half is left, the first of them next."""

    @property
    def output(self) -> Tensor:
        """What the last layer computed: hidden_BTD."""
        assert self._output is not None, "the forward has not come to its end"
        return self._output

    def forward(self, source: Tensor) -> Iterator[None]:
        """Run the layers on ids_BT or hidden_BTD; yields after each."""
        lengths = self.lengths or (source.shape[1],)
        positions_T = torch.cat([torch.arange(length, device=source.device) for length in lengths])
        calls: dict[str | None, LayerCall | None] = {}
        for part in self.parts:
            source = source.detach()
            if source.is_floating_point():
                source.requires_grad_()
            kind = kind_of(part)
            graph = LayerGraph(part, source, positions_T, calls.get(kind))
            self._graphs.append(graph)
            source = graph.compute_only() if self.recompute else graph.compute()
            calls[kind] = graph.call
            yield
        self._output = source.detach()

    def backward(self, gradient_BTD: Tensor) -> Iterator[None]:
        """Run them backwards, accumulating the parameters' gradients; yields after each half of a layer."""
        for _ in self.input_gradient(gradient_BTD):
            yield
            yield from self.weight_gradient()

    def input_gradient(self, gradient_BTD: Tensor) -> Iterator[None]:
        """The first half of `backward`: the input's gradient alone; yields after each layer."""
        gradient: Tensor | None = gradient_BTD
        while self._graphs:
            graph = self._graphs.pop()
            if graph.output is None:  # it wasn't kept
                graph.compute()
                yield
            assert gradient is not None
            gradient = graph.input_gradient(gradient)
            self._halves.append(graph)
            yield
        self.gradient = gradient

    def weight_gradient(self) -> Iterator[None]:
        """The second half: accumulate the parameters' gradients; yields after each layer."""
        while self._halves:
            self._halves.popleft().weight_gradient()
            yield


@dataclass(eq=False)
class HeadPass:
    """The head on a microbatch: its loss, and the gradient of the hidden states that reach it."""

    model: StageModel
    hidden_BTD: Tensor
    lengths: tuple[int, ...] = ()
    """The tokens of each example in the row; empty: the row is one example."""
    losses: tuple[float, ...] = ()
    """What each example adds to the loss, in order; their sum is the loss."""
    _gradient_BTD: Tensor | None = None
    _notes: WeightNotes | None = None
    """What the only chunk leaves to be added to the parameters' gradients, if that is less than the gradients."""
    _sums: dict[Tensor, Tensor] = field(default_factory=dict)
    """Else the parameters' gradients."""

    @property
    def loss(self) -> float:
        return sum(self.losses)

    def run(self, targets_BT: Tensor, num_targets: int) -> Iterator[None]:
        """Loss (a mean over ``num_targets``) and backward, `HEAD_ROWS` positions at a time; yields after each.

        The parameters' gradients are kept back until `add_gradients`: a schedule may run several microbatches' heads
        before it comes to the weights' half of the first one's backward.
        """
        lengths = self.lengths or (self.hidden_BTD.shape[1],)
        example_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        losses_E = torch.zeros(len(lengths), dtype=torch.float64)
        self.losses = (0.0,) * len(lengths)
        chunks = target_rows(targets_BT[0], max_rows=HEAD_ROWS)
        for rows_R in chunks:
            logprobs_R, notes = self._go_through(rows_R, targets_BT[0][rows_R], num_targets)
            if len(chunks) > 1 or len(rows_R) > self.hidden_BTD.shape[-1]:
                notes.add_to(self._sums)
            else:
                self._notes = notes
            losses_E.index_add_(0, example_T[rows_R.cpu()], -logprobs_R.cpu().double())
            self.losses = tuple((losses_E / num_targets).tolist())
            yield

    @property
    def gradient_BTD(self) -> Tensor:
        """Of the hidden states; zeros where nothing was asked."""
        if self._gradient_BTD is None:
            self._gradient_BTD = torch.zeros_like(self.hidden_BTD)
        return self._gradient_BTD

    def add_gradients(self) -> None:
        """Accumulate the parameters' gradients."""
        if self._notes is not None:
            self._notes.add_up()
        for parameter, gradient in self._sums.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._sums = {}

    def _go_through(self, rows_R: Tensor, targets_R: Tensor, num_targets: int) -> tuple[Tensor, WeightNotes]:
        """Some positions' way through the head and back; their log-probabilities, and what parameters are to get."""
        assert self.model.head is not None
        hidden_RD = self.hidden_BTD[0][rows_R].detach().requires_grad_()
        notes = WeightNotes()
        with notes:
            logprobs_R = token_logprobs(self.model, hidden_RD, targets_R)
        loss = -logprobs_R.sum() / num_targets
        gradient_RD = notes.input_gradient(
            loss, torch.ones_like(loss), hidden_RD, self.model.head.parameters()
        )
        assert gradient_RD is not None
        self.gradient_BTD[0][rows_R] = gradient_RD
        return logprobs_R.detach(), notes
