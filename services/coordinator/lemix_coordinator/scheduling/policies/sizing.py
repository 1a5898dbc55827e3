"""How many nodes `lemix` holds: the fewest on which the latest arrivals, come somewhat faster, would have been in time.

The arrivals of the last seconds are replayed on 1, 2, … nodes, each a server that takes a work after the other; the
first number whose predicted 95th percentile keeps the SLO is what is needed. Two things keep it from swinging: nodes
are closed by what would be enough for a higher rate, watched for a while since the last change; they are opened by what
is needed now, or when requests were late already (measured, not predicted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapreplace
from math import sqrt
from typing import Final

from lemix_coordinator.scheduling.cluster_state import UNFINISHED, Arrival, ClusterState
from lemix_coordinator.scheduling.policies.policy import PolicyOptions, Preference, open_nodes
from lemix_coordinator.scheduling.work import Resize

WATCHED_S: Final = 2.0
"""Arrivals that are replayed: of so many seconds."""
FIRST_LOOK_S: Final[Mapping[Preference, float]] = {"nodes": 0.5, "balanced": 0.5, "speed": 1.0}
"""Before that nothing is known."""
HEADROOM: Final[Mapping[Preference, float]] = {"nodes": 1.3, "balanced": 1.5, "speed": 2.0}
"""How much faster arrivals are taken to come when nodes are closed."""
SPARE: Final[Mapping[Preference, int]] = {"nodes": 0, "balanced": 0, "speed": 1}
"""Nodes more than requests need: training then runs beside them, not among them."""
LATE_SHARE: Final = 0.05
RECENT_RESPONSES: Final = 32


def resize_for(options: PolicyOptions, state: ClusterState, now: float) -> Resize:
    """Nodes to open or to close."""
    history = state.history
    if not history.arrivals:
        return Resize()
    opened = open_nodes(state)
    since = max(now - WATCHED_S, history.resized_at, history.began_at)
    seen_s = now - since
    latest = [one for one in history.arrivals if one.arrived_at >= now - WATCHED_S and not one.is_training]
    spare = SPARE[options.prefer] if history.num_trainings else 0
    most = state.num_nodes
    is_late = _late_share(options, state, now) > LATE_SHARE
    if is_late and len(opened) < most and latest:
        wanted = min(most, max(len(opened) + 1, needed(options, latest, 1.0, most) + spare))
        if wanted > len(opened):
            return _open(state, opened, wanted)
    if len(opened) > 1 and seen_s >= FIRST_LOOK_S[options.prefer] and not is_late:
        enough = needed(options, latest, HEADROOM[options.prefer] * _uncertainty(len(latest)), most) + spare
        if enough < len(opened):
            return _close(state, opened, max(1, enough))
    return Resize()


def needed(options: PolicyOptions, arrivals: Sequence[Arrival], faster: float, most: int) -> int:
    """The fewest nodes on which 95 % of these would be in time, came they so many times as fast; `most` if none is."""
    for number in range(1, most):
        free = [0.0] * number
        late = 0
        for arrival in arrivals:
            at = (arrival.arrived_at - arrivals[0].arrived_at) / faster
            begin = max(at, free[0])
            heapreplace(free, begin + arrival.busiest_s)
            late += begin - at + arrival.total_s > options.slo_s
        if late <= LATE_SHARE * len(arrivals):
            return number
    return most


def _uncertainty(count: int) -> float:
    """How much higher the rate may be than so many arrivals say."""
    return (count + 2 * sqrt(count) + 2) / max(count, 1)


def _late_share(options: PolicyOptions, state: ClusterState, now: float) -> float:
    recent = [
        one.response_s > options.slo_s
        for one in state.history.responses[-RECENT_RESPONSES:]
        if one.ended_at >= now - WATCHED_S
    ]
    return sum(recent) / len(recent) if recent else 0.0


def _open(state: ClusterState, opened: Sequence[int], wanted: int) -> Resize:
    """Nodes that still have something to end first: they hold the model yet."""
    closed = sorted(
        set(range(state.num_nodes)) - set(opened), key=lambda node: (-state.facts_FN[UNFINISHED, node], node)
    )
    return Resize(open=tuple(closed[: wanted - len(opened)]), reason="requests are late")


def _close(state: ClusterState, opened: Sequence[int], wanted: int) -> Resize:
    """Those with the least to end; of equals the last."""
    order = sorted(opened, key=lambda node: (state.facts_FN[UNFINISHED, node], -node))
    return Resize(close=tuple(order[: len(opened) - wanted]), reason="fewer are enough")
