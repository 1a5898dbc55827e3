"""A backward in two halves, on a graph small enough to know."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lemix_stage_worker.split_backward import WeightNotes


class Layer:
    """A product with a weight, a scale, a product of the other kind, and a way around them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.wide, self.scale = parameter(5, 4), parameter(5)
        self.narrow, self.bias = parameter(5, 4), parameter(4)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self.wide, self.scale, self.narrow, self.bias

    def __call__(self, source: Tensor) -> Tensor:
        hidden = torch.sigmoid(functional.linear(source, self.wide, None)) * self.scale
        return torch.addmm(self.bias, hidden, self.narrow) + source

    def gradients(self) -> list[Tensor | None]:
        return [one.grad for one in self.parameters]


def source(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def first_half(layer: Layer, seed: int) -> tuple[WeightNotes, Tensor]:
    """What is left to do, and the input's gradient."""
    notes, begin = WeightNotes(), source(seed)
    with notes:
        output = layer(begin)
    found = notes.input_gradient(output, torch.ones_like(output), begin, layer.parameters)
    assert found is not None
    return notes, found


def test_the_halves_add_up_to_the_whole() -> None:
    """The first half leaves the parameters alone; the second adds to what they have; autograd says the same."""
    whole, halves = Layer(), Layer()
    for seed in (1, 2):
        begin = source(seed)
        whole(begin).sum().backward()  # type: ignore[no-untyped-call]
        before = [None if one is None else one.clone() for one in halves.gradients()]
        notes, found = first_half(halves, seed)
        torch.testing.assert_close(found, begin.grad)
        for now, then in zip(halves.gradients(), before, strict=True):
            assert (now is None and then is None) or (
                now is not None and then is not None and torch.equal(now, then)
            )
        notes.add_up()
        torch.testing.assert_close(halves.gradients(), whole.gradients())
        assert not any(one is not None and one.requires_grad for one in halves.gradients())


def test_a_first_half_may_run_ahead() -> None:
    """What a later microbatch's first half computes isn't among the gradients until its own second half."""
    alone, ahead = Layer(), Layer()
    first_half(alone, 1)[0].add_up()
    left, _ = first_half(ahead, 1)
    first_half(ahead, 2)
    left.add_up()
    for one, other in zip(alone.gradients(), ahead.gradients(), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_what_is_not_to_be_learned_gets_no_gradient() -> None:
    """And the others and the input get theirs."""
    layer = Layer()
    layer.wide.requires_grad_(False)
    layer.bias.requires_grad_(False)
    notes, found = first_half(layer, 1)
    notes.add_up()
    assert [one is None for one in layer.gradients()] == [True, False, False, True]
    begin = source(1)
    layer(begin).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, begin.grad)


@pytest.mark.parametrize("padding", [None, 2])
def test_a_lookup_s_gradient_is_added_row_by_row(padding: int | None) -> None:
    """As autograd would, a token that comes twice counting twice, and a padding token not at all."""
    ids = torch.tensor([[1, 2, 1, 0]])
    weight = nn.Parameter(torch.arange(12.0).reshape(4, 3))
    scale = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def layer() -> Tensor:
        return functional.embedding(ids, weight, padding) * scale

    layer().sum().backward()  # type: ignore[no-untyped-call]
    expected = [weight.grad, scale.grad]
    weight.grad = scale.grad = None
    notes = WeightNotes()
    with notes:
        output = layer()
    assert notes.input_gradient(output, torch.ones_like(output), ids, [weight, scale]) is None
    assert weight.grad is None
    notes.add_up()
    torch.testing.assert_close([weight.grad, scale.grad], expected)


def test_a_lookup_keeps_rows_not_a_gradient_of_the_whole_table() -> None:
    """What waits for the second half is as large as what was looked up, in the way in which models look up."""
    embedding = nn.Embedding(1_000, 3, padding_idx=7)
    ids = torch.tensor([[1, 2, 1, 7]])
    notes = WeightNotes()
    with notes:
        output = embedding(ids)
    notes.input_gradient(output, torch.ones_like(output), ids, embedding.parameters())
    kept = [cell.cell_contents for _, add in notes._notes for cell in add.__closure__ or ()]
    assert sorted(part.numel() for part in kept if part is not embedding.weight) == [3, 9]
    notes.add_up()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[[1, 2, 7]].tolist() == [[2.0] * 3, [1.0] * 3, [0.0] * 3]


def test_notes_can_be_added_to_sums_of_one_s_own() -> None:
    """They are what the parameters' gradients would be, and those are left alone."""
    expected, layer = Layer(), Layer()
    sums: dict[Tensor, Tensor] = {}
    for seed in (1, 2):
        first_half(expected, seed)[0].add_up()
        first_half(layer, seed)[0].add_to(sums)
    assert layer.gradients() == [None] * 4
    for parameter, gradient in zip(layer.parameters, expected.gradients(), strict=True):
        assert gradient is not None
        assert torch.equal(sums[parameter], gradient)


@pytest.mark.parametrize(
    "act", [lambda layer: first_half(layer, 1)[0].add_up(), lambda layer: first_half(layer, 1)]
)
def test_nothing_is_left_to_the_garbage_collector(act: Callable[[Layer], object]) -> None:
    """A layer's memory is free when nobody asks for it any more, not when cycles of references are found."""
    layer = Layer()
    gc.collect()
    gc.disable()
    try:
        act(layer)
        assert gc.collect() == 0
    finally:
        gc.enable()
