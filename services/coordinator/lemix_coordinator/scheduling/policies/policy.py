"""What a policy is: two pure functions of what is known of the cluster, and the options that they were made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.work import Decision, Resize, Work

Preference = Literal["nodes", "balanced", "speed"]


class Policy(Protocol):
    """Keeps nothing itself: equal states, works and moments, equal answers."""

    @property
    def name(self) -> str:
        """As it was asked for."""
        ...

    @property
    def uses_state(self) -> bool:
        """Whether its answers depend on more of the state than which nodes are open; else nobody need keep it."""
        ...

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """Where this work goes."""
        ...

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """Which nodes are to be opened or closed, asked every now and then."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What there is to choose; each policy takes what concerns it."""

    seed: int = 0
    training_rate: float = 0.5
    """The share of training among the works: what `separate` splits the nodes by."""
    prefer: Preference = "balanced"
    """Of `lemix`: what it is to be good at where one thing costs another."""
    slo_s: float = 1.0
    """The response time that requests are to keep."""
    use_nodes: int | None = None
    """Of the `+` policies: the first so many; None: all."""
    uses_profile: bool = True
    """Of `lemix-prototype`: without, it goes by the slopes that it begins with."""
    prioritises: bool = True
    """Whether training that would make requests late goes behind them."""
    checks_memory: bool = True
    """Whether a node without room for a work is passed over."""
    alpha: float = 0.15
    """Of the paper: the weight of the response time, its λ₁."""
    beta: float = 0.05
    """Of the paper: the weight of equal lengths, its λ₂."""
    epsilon: float = 0.2
    """Of the paper: idle seconds that count for nothing, its τ."""


def open_nodes(state: ClusterState) -> list[int]:
    """Those that take work, in their order."""
    nodes: list[int] = np.flatnonzero(state.is_open_N).tolist()
    return nodes


class NeverResizes:
    """What policies have in common that leave all nodes open, as everybody's did before."""

    __slots__ = ()

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """Never."""
        del state, waiting, now
        return Resize()
