"""A layer's backward in two halves: its input's gradient, for which the stage before waits, and its weights', later.

This is what zero-bubble schedules need (Qi et al., "Zero Bubble Pipeline Parallelism", 2023). Nearly all of the second
half are products. So a layer is computed under `WeightNotes`: the backward of a product with a weight then makes its
input's gradient only, and notes what its weight's is made of. The second half adds that to the weight's gradient. What
else parameters get (biases, norms) is little; it is computed in the first half and kept until the second.

A whole backward is both halves, one after the other, so every schedule leaves the same bits. It is faster than
autograd's own, which makes each gradient and then adds it to those before, where a product can add in place; and which
makes zeros of the embedding's size for each microbatch.

Shapes: N tokens, I and O the inputs and outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Addition = Callable[[Tensor | None], Tensor]
"""Adds its part to what there is of a gradient, in place, or makes a beginning."""
Note = tuple[Tensor, Addition]
"""A parameter, and what is still to be added to its gradient."""
_PLAIN_LOOKUP = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
"""Options of torch's lookup, which it names when it asks a mode."""


class WeightNotes(TorchFunctionMode):
    """One layer's: entered (``with``) while the layer is computed, they fill while it goes back, and are used once."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = torch.empty(0, requires_grad=True)
        """Where a layer begins whose input has no gradient: the way back leads here, through all of the layer."""
        self._noted: set[Tensor] = set()
        self._notes: list[Note] = []

    def __torch_function__(
        self, called: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take products with parameters and lookups in them; all else is computed as it would be."""
        match called, args:
            case functional.linear, (source, nn.Parameter() as weight, bias) if not kwargs:
                return self._product(source, weight, bias, is_transposed=True)
            case torch.addmm, (bias, source, nn.Parameter() as weight) if not kwargs:
                return self._product(source, weight, bias, is_transposed=False)
            case functional.embedding, (ids, nn.Parameter() as weight) if (
                weight.requires_grad and _PLAIN_LOOKUP.items() <= (kwargs or {}).items()
            ):
                self._noted.add(weight)
                padding = kwargs["padding_idx"]
                return _Lookup.apply(self.begin, ids, weight, padding, self._notes)  # type: ignore[no-untyped-call]
        return called(*args, **(kwargs or {}))

    def input_gradient(
        self, output: Tensor, gradient: Tensor, source: Tensor, parameters: Iterable[Tensor]
    ) -> Tensor | None:
        """The first half; None where the input has no gradient. The graph is used up."""
        rest = [one for one in parameters if one.requires_grad and one not in self._noted]
        begin = source if source.requires_grad else self.begin
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            output, [begin, *rest], gradient, allow_unused=True
        )
        self._notes += (
            (parameter, _sum_addition(other))
            for parameter, other in zip(rest, gradients[1:], strict=True)
            if other is not None
        )
        return gradients[0] if begin is source else None

    @torch.no_grad()
    def add_up(self) -> None:
        """The second half: add what was noted to the parameters' gradients."""
        while self._notes:
            parameter, add = self._notes.pop(0)
            parameter.grad = add(parameter.grad)

    @torch.no_grad()
    def add_to(self, sums: dict[Tensor, Tensor]) -> None:
        """The same with sums of the caller's, by parameter, in place of the parameters' gradients."""
        while self._notes:
            parameter, add = self._notes.pop(0)
            sums[parameter] = add(sums.get(parameter))

    def _product(
        self, source: Tensor, weight: nn.Parameter, bias: Tensor | None, *, is_transposed: bool
    ) -> Any:
        if weight.requires_grad:
            self._noted.add(weight)
        notes = self._notes if weight.requires_grad else None
        return _Product.apply(source, weight, bias, is_transposed, notes)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """A product with a weight, (I, O) or transposed, that leaves the weight's gradient to a note."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        is_transposed: bool,
        notes: list[Note] | None,
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.is_transposed, ctx.notes = is_transposed, notes
        if is_transposed:
            return functional.linear(source, weight, bias)
        assert bias is not None
        return torch.addmm(bias, source, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors
        gradient_NO, source_NI = gradient.flatten(0, -2), source.detach().flatten(0, -2)
        if ctx.notes is not None:
            pair = (gradient_NO.t(), source_NI) if ctx.is_transposed else (source_NI.t(), gradient_NO)
            ctx.notes.append((weight, _product_addition(*pair)))
        of_source = (
            gradient @ (weight if ctx.is_transposed else weight.t()) if ctx.needs_input_grad[0] else None
        )
        of_bias = gradient_NO.sum(0) if ctx.needs_input_grad[2] else None
        return of_source, None, of_bias, None, None


class _Lookup(torch.autograd.Function):
    """Rows of an embedding, whose gradient is left to a note."""

    @staticmethod
    def forward(
        ctx: Any, _begin: Tensor, ids: Tensor, weight: Tensor, padding: int | None, notes: list[Note]
    ) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding, ctx.notes = padding, notes
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ids, weight = ctx.saved_tensors
        ids_N, gradient_NO = ids.flatten(), gradient.flatten(0, -2)
        if ctx.padding is not None:
            counts_N = ids_N != ctx.padding % len(weight)
            ids_N, gradient_NO = ids_N[counts_N], gradient_NO[counts_N]
        ctx.notes.append((weight, _row_addition(weight, ids_N, gradient_NO)))
        return None, None, None, None, None


def _product_addition(left: Tensor, right: Tensor) -> Addition:
    return lambda before: left @ right if before is None else before.addmm_(left, right)


def _row_addition(weight: Tensor, ids_N: Tensor, gradient_NO: Tensor) -> Addition:
    def add(before: Tensor | None) -> Tensor:
        return (torch.zeros_like(weight) if before is None else before).index_add_(0, ids_N, gradient_NO)

    return add


def _sum_addition(gradient: Tensor) -> Addition:
    return lambda before: gradient.contiguous() if before is None else before.add_(gradient)
