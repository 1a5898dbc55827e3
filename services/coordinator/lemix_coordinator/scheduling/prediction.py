"""What would become of a work on each node, were it placed now.

Times of stages come from the profile's lines, what is ahead of the work from the state (`node_state` has the rules).
An idle node's answer is the sum of its stage times and the hops between them. Nothing is committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lemix_coordinator.scheduling.cluster_state import CONTEXTS, ROWS, ClusterState
from lemix_coordinator.scheduling.columns import Columns, Floats, first_fit, without_backwards
from lemix_coordinator.scheduling.node_state import Span, path_on
from lemix_coordinator.scheduling.pass_times import PassTimes, pass_times
from lemix_coordinator.scheduling.work import Work

Wait = Literal["", "immediate", "far"]
"""What a stage's forward began right behind: earlier forwards or nothing, the stage before, an earlier backward."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """A figure a node, closed ones included."""

    response_s: Floats
    """From the work's arrival to the end of its last forward; of a generation, to its last token."""
    idle_s: Floats
    """Mean over the stages of the time between their last forward and this one in which they have nothing to do."""
    times: PassTimes
    """The same on every node."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The predicted way of a work through one node."""

    forward_S: tuple[Span, ...]
    backward_S: tuple[Span, ...]
    waits_S: tuple[Wait, ...]
    response_s: float
    idle_s: float


def predict(state: ClusterState, work: Work, now: float, *, with_idle: bool = True) -> Predictions:
    """Of every node; idle times are left at 0 for who doesn't ask."""
    times = pass_times(state.profile, work)
    if state.columns is None:
        overtakes = state.overtakes(work)
        paths = [path_on(node, times, now, forward_only=True, overtakes=overtakes) for node in state.nodes]
        ends_N = np.array([path.forward_S[-1][1] for path in paths])
        idle_N = np.array([path.idle_s for path in paths])
    else:
        columns = without_backwards(state.columns) if state.overtakes(work) else state.columns
        ends_N, idle_N = _ends(columns, times, now, with_idle=with_idle)
    response_N = ends_N - work.arrived_at
    if work.new_tokens > 1:
        response_N += _decode_s(state, work)
    return Predictions(response_N, idle_N, times)


def trace(state: ClusterState, work: Work, node: int, now: float) -> Trace:
    """Of one node, stage by stage."""
    times = pass_times(state.profile, work)
    path = path_on(state.nodes[node], times, now, overtakes=state.overtakes(work))
    waits: list[Wait] = []
    handed_over = None
    for (begin, end), is_far in zip(path.forward_S, path.far_S, strict=True):
        waits.append("far" if is_far else "immediate" if begin == handed_over else "")
        handed_over = end + times.hop_s
    response_s = path.forward_S[-1][1] - work.arrived_at + state.decode_s(work, node)
    return Trace(path.forward_S, path.backward_S, tuple(waits), response_s, path.idle_s)


def _ends(columns: Columns, times: PassTimes, now: float, *, with_idle: bool) -> tuple[Floats, Floats]:
    """Of each node: when the last forward ends, and the idle time; `path_on` for all nodes at once."""
    num_stages, num_nodes = columns.free_SN.shape
    ready_N: Floats = np.full(num_nodes, now)
    idle_N: Floats = np.zeros(num_nodes)
    for stage, seconds in enumerate(times.forward_S):
        begin_N, before_N = first_fit(columns, stage, ready_N, seconds, with_idle=with_idle)
        if with_idle:
            idle_N += before_N
        ready_N = begin_N + (seconds + times.hop_s)
    return ready_N - times.hop_s, idle_N / num_stages


def _decode_s(state: ClusterState, work: Work) -> Floats:
    rows_N = state.facts_FN[ROWS] + len(work.lengths)
    contexts_N = state.facts_FN[CONTEXTS] + work.decoded_contexts
    return (work.new_tokens - 1) * state.iteration.of_all(rows_N, contexts_N)
