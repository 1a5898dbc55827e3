"""The paper's LeMix as it is meant to be: the least cost of response time, idle time and unlike lengths.

cost(n) = λ₁ · response ÷ SLO + idle ÷ mean service − λ₂ · likeness(n), where idle is max(τ, the mean over stages of
what they would idle before this work, less the time since the node's last arrival), and likeness the normal density of
the work's length under the node's lengths, scaled to 1 at their mean. It rises with the response time, unlike the
prototype's score. Training that would make requests late on every node waits behind them, for a bounded time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lemix_coordinator.scheduling.cluster_state import (
    HELD,
    LAST_ARRIVAL,
    MEAN_LENGTH,
    NUM_LENGTHS,
    SQUARES,
    TRAINING,
    UNFINISHED,
    ClusterState,
)
from lemix_coordinator.scheduling.columns import Floats
from lemix_coordinator.scheduling.pass_times import PassTimes
from lemix_coordinator.scheduling.policies.policy import NeverResizes, PolicyOptions
from lemix_coordinator.scheduling.prediction import Predictions, predict
from lemix_coordinator.scheduling.work import Decision, Work

LATEST: Final = 32
"""Works that the mean service time is taken over."""
DEFERRED_SLOS: Final = 20.0
"""Training that has waited so long is placed whatever it costs requests."""


@dataclass(frozen=True, slots=True)
class LemixPaper(NeverResizes):
    """As intended."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """The node of the least cost among those with room."""
        predictions = predict(state, work, now)
        cost_N = paper_cost(
            self.options,
            state,
            work,
            now,
            response_N=predictions.response_s,
            idle_N=predictions.idle_s,
            service_s=mean_service_s(state, predictions.times),
        )
        cost_N = np.where(has_room(self.options, state, predictions.times), cost_N, np.inf)
        node = int(cost_N.argmin())
        if cost_N[node] == np.inf:
            return Decision(node=None, reason="no room")
        if work.is_training and self.options.prioritises and self._endangers(state, predictions, work, now):
            return Decision(node=None, reason="behind requests", again_at=now + self.options.slo_s)
        return Decision(node=node, reason="least cost")

    def _endangers(self, state: ClusterState, predictions: Predictions, work: Work, now: float) -> bool:
        """Whether a request behind it would be late on every node, and it hasn't waited for long."""
        ends_N = predictions.response_s[state.is_open_N] - (now - work.arrived_at)
        own_s = sum(predictions.times.backward_S)
        is_late = float(ends_N.min()) + own_s > self.options.slo_s and bool(
            (state.facts_FN[UNFINISHED] - state.facts_FN[TRAINING]).any()
        )
        return is_late and now - work.arrived_at < DEFERRED_SLOS * self.options.slo_s


def paper_cost(  # noqa: PLR0913 - the formula's terms, by name
    options: PolicyOptions,
    state: ClusterState,
    work: Work,
    now: float,
    *,
    response_N: Floats,
    idle_N: Floats,
    service_s: float,
) -> Floats:
    """Of each node."""
    facts_FN = state.facts_FN
    since_N = now - facts_FN[LAST_ARRIVAL]
    beyond_N = np.maximum(idle_N - since_N, options.epsilon)
    alike_N = likeness(state, max(work.lengths))
    cost_N: Floats = (
        options.alpha * response_N / options.slo_s + beyond_N / service_s - options.beta * alike_N
    )
    return cost_N


def mean_service_s(state: ClusterState, times: PassTimes) -> float:
    """What the latest works took alone on a node; before there are any, what this one does."""
    latest = state.history.arrivals[-LATEST:]
    return sum([one.total_s for one in latest]) / len(latest) if latest else times.total_s


def likeness(state: ClusterState, length: int) -> Floats:
    """How near this length is to those a node has had: 1 at their mean, 0 far off or with fewer than two."""
    facts_FN = state.facts_FN
    variance_N = facts_FN[SQUARES] / np.maximum(facts_FN[NUM_LENGTHS], 1.0)
    off_N = length - facts_FN[MEAN_LENGTH]
    alike_N: Floats = np.where(
        variance_N > 0, np.exp(-0.5 * off_N * off_N / np.maximum(variance_N, 1e-9)), 0.0
    )
    return alike_N


def has_room(options: PolicyOptions, state: ClusterState, times: PassTimes) -> NDArray[np.bool_]:
    """Open nodes whose memory would hold this work too; an empty one has room for anything."""
    if not options.checks_memory:
        return state.is_open_N
    facts_FN = state.facts_FN
    fits_N = (facts_FN[HELD] + max(times.bytes_S) <= state.room_bytes) | (facts_FN[UNFINISHED] == 0)
    roomy_N: NDArray[np.bool_] = state.is_open_N & fits_N
    return roomy_N
