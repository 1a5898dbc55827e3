"""A layer's backward in two halves: its input's gradient, for which the stage before waits, and its weights', later.

This is what zero-bubble schedules need (Qi et al., "Zero Bubble Pipeline Parallelism", 2023). Autograd computes only
what it is asked for, so the first half asks for the input's gradient alone. On its way it passes the nodes where
parameters *join* (a product with a weight, a norm's scale), and keeps the gradients that arrive there. The second half
goes from each join to its parameters only. No product is computed twice, and each runs as in a whole backward, so all
bits are the same; that takes each parameter to be used once in a layer.

Between the halves only what joins saved is needed. Autograd frees a graph whole or not at all, so the graph's tensors
are kept behind `Shelf`, from which the first half takes away what it alone needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks


@dataclass(eq=False, slots=True)
class _Kept:
    tensor: Tensor | None


@dataclass(eq=False)
class Shelf:
    """The tensors that one layer's graph saved: what the nodes of the graph hold are places on it.

    Autograd can't tell then that one of them was changed in place: nobody may, between forward and backward.
    """

    _is_clearing: bool = False
    _taken: list[_Kept] = field(default_factory=list)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What is computed meanwhile saves its tensors here."""
        with saved_tensors_hooks(_Kept, self._take):
            yield

    @contextmanager
    def clearing(self, joins: Sequence[Join]) -> Iterator[None]:
        """What is taken meanwhile is let go at the end, but for what joins take: they will need it again."""

        def enter(_gradients: tuple[Tensor, ...]) -> None:
            self._is_clearing = False

        def leave(_inputs: tuple[Tensor, ...], _outputs: tuple[Tensor, ...]) -> None:
            self._is_clearing = True

        handles = [join.node.register_prehook(enter) for join in joins]
        handles += [join.node.register_hook(leave) for join in joins]
        self._is_clearing = True
        yield
        self._is_clearing = False
        for handle in handles:
            handle.remove()
        for kept in self._taken:
            kept.tensor = None
        self._taken.clear()

    def _take(self, kept: _Kept) -> Tensor:
        assert kept.tensor is not None, "the first half used this part of the graph up"
        if self._is_clearing:
            self._taken.append(kept)
        return kept.tensor


@dataclass(eq=False)
class Join:
    """A node on the way from a layer's output to its input where parameters come in."""

    node: Node
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()
    """That arrived at the node's outputs."""

    def keep(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.gradients = gradients

    def accumulate(self) -> None:
        """Add the parameters' gradients to what they have."""
        arrived = [
            (GradientEdge(self.node, index), gradient)
            for index, gradient in enumerate(self.gradients)
            if gradient is not None
        ]
        edges, gradients = zip(*arrived, strict=True)
        found = torch.autograd.grad(edges, self.parameters, grad_outputs=gradients)
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.contiguous()
            else:
                parameter.grad.add_(gradient)


def find_joins(output: Tensor, source: Tensor) -> list[Join]:
    """The joins of a layer, from its output to its input."""
    leads = {get_gradient_edge(source).node: True}
    _follow(get_gradient_edge(output).node, leads)
    return [
        Join(node, parameters)
        for node in reversed(leads)
        if leads[node]
        and (parameters := tuple(_parameters(one for one in _following(node) if not leads[one])))
    ]


def _follow(node: Node, leads: dict[Node, bool]) -> bool:
    """Whether a node leads to one that is said to; what is found is noted, what follows a node before it."""
    if node not in leads:
        found = [_follow(following, leads) for following in _following(node)]
        leads[node] = any(found)
    return leads[node]


def input_gradient(
    output: Tensor, gradient: Tensor, source: Tensor, shelf: Shelf
) -> tuple[Tensor, list[Join]]:
    """The gradient of a layer's input, and the joins that now wait for `Join.accumulate`."""
    joins = find_joins(output, source)
    handles = [join.node.register_prehook(join.keep) for join in joins]
    with shelf.clearing(joins):
        (found,) = torch.autograd.grad(output, source, gradient, retain_graph=True)
    for handle in handles:
        handle.remove()
    return found, joins


def _following(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _parameters(nodes: Iterator[Node]) -> Iterator[Tensor]:
    """The leaves that nodes lead to."""
    for node in nodes:
        if hasattr(node, "variable"):
            yield node.variable
        else:
            yield from _parameters(iter(_following(node)))
