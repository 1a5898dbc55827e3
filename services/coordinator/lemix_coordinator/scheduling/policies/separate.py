"""Nodes that only serve and nodes that only train, as the paper's baselines split them; in turn on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies.policy import NeverResizes, PolicyOptions, open_nodes
from lemix_coordinator.scheduling.work import Decision, Work

CALM_REQUESTS_PER_SECOND: Final = 15.0
"""Up to here a quarter of the nodes serves in `separate-dynamic`, above it a half."""
RATE_OVER: Final = 32
"""Latest requests that their rate is taken over."""


@dataclass(frozen=True, slots=True)
class Separate(NeverResizes):
    """The last nodes train: as many as the training rate rounds to (to even, as the prototype), one at least."""

    name: str
    options: PolicyOptions
    uses_state: bool = False

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By number, on its side."""
        del now
        nodes = open_nodes(state)
        num_training = max(1, round(len(nodes) * self.options.training_rate))
        return _on_its_side(nodes, max(1, len(nodes) - num_training), work)


@dataclass(frozen=True, slots=True)
class SeparateDynamic(NeverResizes):
    """A quarter of the nodes serves while requests are few, a half when they are many; the others train."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By number, on its side."""
        nodes = open_nodes(state)
        share = 4 if request_rate(state, now) <= CALM_REQUESTS_PER_SECOND else 2
        return _on_its_side(nodes, max(1, len(nodes) // share), work)


def request_rate(state: ClusterState, now: float) -> float:
    """Requests a second, of the latest ones; 0 before there are two."""
    moments = [one.arrived_at for one in state.history.arrivals if not one.is_training][-RATE_OVER:]
    return (len(moments) - 1) / max(now - moments[0], 1e-9) if len(moments) > 1 else 0.0


def _on_its_side(nodes: Sequence[int], num_serving: int, work: Work) -> Decision:
    """On one node, both sides are it."""
    training = nodes[num_serving:] or nodes
    side = training if work.is_training else nodes[:num_serving]
    return Decision(node=side[work.number % len(side)], reason="trains" if work.is_training else "serves")
