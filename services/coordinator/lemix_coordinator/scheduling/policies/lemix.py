"""LeMix's own policy, the default: requests in time first, on the fewest nodes that keep them so.

A request goes where it costs least among the nodes on which it is predicted to be in time: its response in SLOs, and a
penalty where training runs, which it would hold up. One that is in time nowhere goes where requests are late already,
so that a burst spoils one node's answers and not all. Training goes where it ends first; while every node is under
pressure it waits behind the endangered requests, for a bounded time. How many nodes there are is `sizing`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lemix_coordinator.scheduling.cluster_state import TRAINING, ClusterState
from lemix_coordinator.scheduling.columns import Floats
from lemix_coordinator.scheduling.policies.lemix_paper import has_room
from lemix_coordinator.scheduling.policies.policy import PolicyOptions, Preference
from lemix_coordinator.scheduling.policies.sizing import resize_for
from lemix_coordinator.scheduling.prediction import Predictions, predict
from lemix_coordinator.scheduling.work import Decision, Resize, Work

IN_TIME: Final = 0.9
"""Of the SLO: what is predicted later than this may end too late, by what comes after it."""
LATE_ENOUGH: Final = 100.0
"""SLOs: a node where requests are predicted this late gets no more of them while another is less so."""
TRAINING_COSTS: Final[Mapping[Preference, float]] = {"nodes": 0.1, "balanced": 0.3, "speed": 10.0}
"""SLOs of response that a request accepts so as not to hold up training."""
DEFERRED_SLOS: Final = 20.0
"""Training waits behind endangered requests at most so long."""
PRESSED: Final = 0.5
"""Of the SLO: on a node where work waits so long requests are endangered."""
HARDLY: Final = 0.04
"""Of the time that training takes: what with `speed` requests may hold it up."""


@dataclass(frozen=True, slots=True)
class Lemix:
    """Ours."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """The node of the least cost; nowhere yet, if none has room or training has to wait."""
        predictions = predict(state, work, now, with_idle=False)
        usable_N = has_room(self.options, state, predictions.times)
        if not usable_N.any():
            return Decision(node=None, reason="no room")
        if not work.is_training:
            return self._request(state, predictions, usable_N)
        response_N = np.where(usable_N, predictions.response_s, np.inf)
        node = int(response_N.argmin())
        waits_s = float(response_N[node]) - predictions.times.idle_s
        waited_s = now - work.arrived_at
        if (
            self.options.prioritises
            and self.options.prefer != "speed"
            and waits_s - waited_s > PRESSED * self.options.slo_s
            and waited_s < DEFERRED_SLOS * self.options.slo_s
        ):
            return Decision(node=None, reason="behind requests", again_at=now + self.options.slo_s)
        return Decision(node=node, reason="ends first")

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """As many nodes as the latest arrivals would need."""
        del waiting  # what is late already says more
        return resize_for(self.options, state, now)

    def _request(
        self, state: ClusterState, predictions: Predictions, usable_N: NDArray[np.bool_]
    ) -> Decision:
        slo_s = self.options.slo_s
        late_N = predictions.response_s / slo_s
        training_N = np.minimum(state.facts_FN[TRAINING], 1.0)
        cost_N = np.where(usable_N, request_cost(self.options.prefer, late_N, training_N), np.inf)
        node = int(cost_N.argmin())
        if late_N[node] <= IN_TIME:
            return Decision(node=node, reason="in time")
        in_time_N = usable_N & (late_N <= IN_TIME)
        if in_time_N.any() and (self.options.prefer != "speed" or self._hardly_delays(state, predictions)):
            return Decision(node=int(np.where(in_time_N, cost_N, np.inf).argmin()), reason="in time")
        spoilt_N = np.where(usable_N & (training_N == 0) & (late_N <= LATE_ENOUGH), late_N, -np.inf)
        latest = int(spoilt_N.argmax())
        return Decision(node=latest if spoilt_N[latest] > -np.inf else node, reason="late")

    def _hardly_delays(self, state: ClusterState, predictions: Predictions) -> bool:
        """Whether requests could all be spread over the nodes, those that train too, and training end hardly later."""
        trained_s = next((one.total_s for one in reversed(state.history.arrivals) if one.is_training), 0.0)
        share = self.options.training_rate
        return (1 - share) * predictions.times.busiest_s / state.num_open <= HARDLY * share * trained_s


def request_cost(prefer: Preference, late_N: Floats, training_N: Floats) -> Floats:
    """Of each node: the response in SLOs, and what holding up training counts."""
    cost_N: Floats = late_N + TRAINING_COSTS[prefer] * training_N
    return cost_N
