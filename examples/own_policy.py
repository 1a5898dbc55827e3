"""A policy of one's own: each work goes to the open node that would end it first.

Name it in your package's pyproject.toml and it is a policy like ours, for `policy =` and for `lemix study`:

    [project.entry-points."lemix.policies"]
    first-done = "own_policy:FirstDone"
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies import PolicyOptions
from lemix_coordinator.scheduling.prediction import predict
from lemix_coordinator.scheduling.work import Decision, Resize, Work


@dataclass(frozen=True)
class FirstDone:
    """Keeps nothing: the state knows the past, predictions the future."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """The node of the least predicted response."""
        response_N = np.where(state.is_open_N, predict(state, work, now).response_s, np.inf)
        return Decision(node=int(response_N.argmin()), reason="ends first")

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """All nodes stay as they are."""
        return Resize()
