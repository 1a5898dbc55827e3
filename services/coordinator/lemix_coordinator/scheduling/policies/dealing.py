"""Policies that look at no node: `naive-mix` deals in turn, `random` draws; with a `+` both keep to the first nodes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies.policy import NeverResizes, PolicyOptions, open_nodes
from lemix_coordinator.scheduling.work import Decision, Work


@dataclass(frozen=True, slots=True)
class NaiveMix(NeverResizes):
    """Requests and training alike, in turn: by a work's number, not by a counter, as the paper's prototype."""

    name: str
    options: PolicyOptions
    uses_state: bool = False

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By number."""
        del now
        nodes = usable(state, self.options)
        return Decision(node=nodes[work.number % len(nodes)], reason="its turn")


@dataclass(frozen=True, slots=True)
class Random(NeverResizes):
    """Each node with the same chance, by the seed and the work's number."""

    name: str
    options: PolicyOptions
    uses_state: bool = False

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By seed and number."""
        del now
        draw = random.Random(f"{self.options.seed}:{work.number}")
        return Decision(node=draw.choice(usable(state, self.options)), reason="drawn")


def usable(state: ClusterState, options: PolicyOptions) -> list[int]:
    """The open nodes; of the `+` variants the first `use_nodes` of them."""
    return open_nodes(state)[: options.use_nodes]
