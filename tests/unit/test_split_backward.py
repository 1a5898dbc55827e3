"""A backward in two halves, on a graph small enough to know."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from lemix_stage_worker.split_backward import Shelf, find_joins, input_gradient


class Graph:
    """A product with a weight, a scale, another product, and a way around them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.source = torch.randn(3, 4, generator=generator).requires_grad_()
        self.wide = torch.randn(5, 4, generator=generator).requires_grad_()
        self.scale = torch.randn(5, generator=generator).requires_grad_()
        self.narrow = torch.randn(4, 5, generator=generator).requires_grad_()
        self.bias = torch.randn(4, generator=generator).requires_grad_()
        self.shelf = Shelf()
        with self.shelf.keeping():
            hidden = torch.sigmoid(torch.nn.functional.linear(self.source, self.wide)) * self.scale
            self.output = torch.nn.functional.linear(hidden, self.narrow, self.bias) + self.source

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.wide, self.scale, self.narrow, self.bias


def test_parameters_join_where_they_meet_what_depends_on_the_input() -> None:
    """From the output back: the second product with its bias, the scale, the first product."""
    graph = Graph()
    joined = [{id(one) for one in join.parameters} for join in find_joins(graph.output, graph.source)]
    assert joined == [{id(graph.narrow), id(graph.bias)}, {id(graph.scale)}, {id(graph.wide)}]


def test_the_halves_add_up_to_the_whole() -> None:
    """The first half leaves the parameters alone; the second adds to what they have; all bits are the same."""
    whole, halves = Graph(), Graph()
    ahead = torch.ones_like(whole.output)
    for _ in range(2):
        torch.autograd.backward(whole.output, ahead, retain_graph=True)
    assert whole.source.grad is not None
    for parameter in halves.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for graph in (halves, again := Graph()):
        gradient, joins = input_gradient(graph.output, ahead, graph.source, graph.shelf)
        assert torch.equal(gradient * 2, whole.source.grad)
        assert not any(one.grad is not None and one.grad.any() for one in graph.parameters)
        for join in joins:
            join.accumulate()
    for expected, added, first in zip(whole.parameters, halves.parameters, again.parameters, strict=True):
        assert expected.grad is not None
        assert added.grad is not None
        assert first.grad is not None
        assert torch.equal(added.grad, first.grad)
        assert torch.equal(added.grad * 2, expected.grad)


def test_the_first_half_uses_up_what_only_it_needs() -> None:
    """The sigmoid's result is gone after it, and a whole backward through the graph would miss it."""
    graph = Graph()
    _, joins = input_gradient(graph.output, torch.ones_like(graph.output), graph.source, graph.shelf)
    with pytest.raises(AssertionError, match="used this part of the graph up"):
        torch.autograd.backward(graph.output, torch.ones_like(graph.output))
    assert len(joins) == 3


def test_what_is_not_to_be_learned_does_not_join() -> None:
    """Parameters without gradients leave nothing for the second half."""
    source = torch.ones(2, 4, requires_grad=True)
    output = torch.nn.functional.linear(source, torch.ones(5, 4))
    gradient, joins = input_gradient(output, torch.ones_like(output), source, Shelf())
    assert torch.equal(gradient, torch.full((2, 4), 5.0))
    assert joins == []


def test_nothing_is_left_to_the_garbage_collector() -> None:
    """A graph's memory is free when its second half has run, not when cycles of references are found."""
    gc.collect()
    gc.disable()
    try:
        graph = Graph()
        _, joins = input_gradient(graph.output, torch.ones_like(graph.output), graph.source, graph.shelf)
        while joins:
            joins.pop().accumulate()
        del graph
        assert gc.collect() == 0
    finally:
        gc.enable()
