"""Policies that look at one figure a node: `luf` at memory in use, `jsq` at unfinished works."""

from __future__ import annotations

from dataclasses import dataclass

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies.dealing import usable
from lemix_coordinator.scheduling.policies.policy import NeverResizes, PolicyOptions
from lemix_coordinator.scheduling.work import Decision, Work


@dataclass(frozen=True, slots=True)
class LeastUsed(NeverResizes):
    """The least memory in use, as the paper's Mix-LUF reads it off the accelerators; the first of equals.

    The prototype asks the driver, and waits long for its answer; here the answer is what is committed, at once.
    """

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By bytes held."""
        del work, now
        held_N = state.held_bytes_N
        return Decision(
            node=min(usable(state, self.options), key=held_N.__getitem__), reason="least memory used"
        )


@dataclass(frozen=True, slots=True)
class ShortestQueue(NeverResizes):
    """The fewest works that haven't ended; the first of equals."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """By number of works."""
        del work, now
        unfinished_N = state.unfinished_N
        return Decision(
            node=min(usable(state, self.options), key=unfinished_N.__getitem__), reason="shortest queue"
        )
