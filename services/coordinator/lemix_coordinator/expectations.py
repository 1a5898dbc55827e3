"""What is expected of an item when it is given to a node, and written down with it: its end, and its objective.

An objective is five times what such requests take on an idle node (INTERFACES: the mean over the requests so far), or
what the setting ``slo_s`` says. Without a profile nobody knows what a node takes, and only the setting counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.pass_times import pass_times
from lemix_coordinator.scheduling.work import Work

SLO_FACTOR: Final = 5.0


@dataclass(frozen=True, slots=True)
class IdleTimes:
    """What requests take on an idle node: means over those that were placed so far."""

    count: int = 0
    forward_s: float = 0.0
    """Of a request's first pass through all stages: a score, or the first token."""
    itl_s: float = 0.0
    """Of a generation's further tokens."""
    num_generations: int = 0
    response_s: float = 0.0
    """Of whole requests: scores, and generations of all the tokens that they may have."""

    def with_request(self, cluster: ClusterState, work: Work) -> IdleTimes:
        """One more request."""
        forward_s = pass_times(cluster.profile, work).idle_s
        count = self.count + 1
        generations, itl_s, response_s = self.num_generations, self.itl_s, forward_s
        if work.kind == "generate":
            alone_s = cluster.iteration.of(1, work.decoded_contexts)
            generations += 1
            itl_s += (alone_s - itl_s) / generations
            response_s += alone_s * max(0, work.new_tokens - 1)
        return IdleTimes(
            count,
            self.forward_s + (forward_s - self.forward_s) / count,
            itl_s,
            generations,
            self.response_s + (response_s - self.response_s) / count,
        )


def objective_of(work: Work, idle: IdleTimes, *, slo_s: float, has_profile: bool) -> Mapping[str, str]:
    """The fields of an item that say until when it should end; none where that isn't known."""
    if slo_s > 0:
        return {"slo_s": f"{slo_s:.6f}"}
    if not has_profile:
        return {}
    if work.kind == "generate":
        return {
            "slo_ttft_s": f"{SLO_FACTOR * idle.forward_s:.6f}",
            "slo_itl_s": f"{SLO_FACTOR * idle.itl_s:.6f}",
        }
    return {"slo_s": f"{SLO_FACTOR * idle.forward_s:.6f}"}
