from __future__ import annotations

import numpy as np
import pytest

from lemix_coordinator.scheduling.cluster_state import FEW_NODES, TRAINING, ClusterState
from lemix_coordinator.scheduling.prediction import predict, trace
from scheduling_scene import filled, profile, work


@pytest.mark.parametrize("nodes", [2, FEW_NODES + 1])
def test_what_is_placed_delays_what_comes_behind_it_on_that_node_only(nodes: int) -> None:
    """By the time that the first stage is taken."""
    idle = ClusterState.idle(profile(), nodes)
    state = idle.assigned(work(0), 1, 0.0)
    took_s = profile().stages[1].forward.of(100, 10_000)
    response_N = predict(state, work(1), 0.0).response_s
    assert response_N[0] == predict(idle, work(1), 0.0).response_s[0]
    assert response_N[1] == pytest.approx(response_N[0] + took_s)


def test_a_measurement_moves_all_that_is_committed_behind_it() -> None:
    """A forward that ended late by so much makes the queue late by so much, and one on time changes nothing."""
    state = ClusterState.idle(profile(), 1)
    ends = []
    for number in range(3):
        ends.append(trace(state, work(number), 0, 0.0).forward_S[0][1])
        state = state.assigned(work(number), 0, 0.0)
    assert state.forward_measured("0", 0, 0, 0.0, ends[0]) is state
    late = state.forward_measured("0", 0, 0, 0.0, ends[0] + 0.5)
    assert trace(late, work(9), 0, 0.0).forward_S[0][0] == pytest.approx(ends[2] + 0.5)
    again = late.forward_measured("1", 0, 0, 0.0, ends[1] + 0.5)
    assert again is late or trace(again, work(9), 0, 0.0) == trace(late, work(9), 0, 0.0)
    early = late.forward_measured("1", 0, 0, 0.0, ends[1])
    assert trace(early, work(9), 0, 0.0).forward_S[0][0] == pytest.approx(ends[2])


def test_a_measured_backward_is_no_longer_to_come() -> None:
    """And one that ended late makes those on the stages before it late."""
    state = ClusterState.idle(profile(), 1).assigned(work(0, kind="train"), 0, 0.0)
    (begin, end), last = trace(ClusterState.idle(profile(), 1), work(0, kind="train"), 0, 0.0).backward_S
    late = state.backward_measured("0", 0, 1, last[0], last[1] + 0.5)
    assert not late.nodes[0].backwards_S[1]
    (one,) = late.nodes[0].backwards_S[0]
    assert (one.begin, one.end) == pytest.approx((begin + 0.5, end + 0.5))


def test_what_has_ended_holds_nothing() -> None:
    """Neither memory nor a place; a second end, or that of a stranger, changes nothing."""
    state = filled(ClusterState.idle(profile(), 2), 10)
    for node in range(2):
        for one in state.nodes[node].committed:
            state = state.ended(one.item, node, 3.0)
    assert not state.unfinished_N.any()
    assert not state.held_bytes_N.any()
    assert not state.facts_FN[TRAINING].any()
    assert state.ended("0", 0, 3.0) is state
    assert state.forward_measured("stranger", 0, 0, 0.0, 9.0) is state
    assert state.backward_measured("stranger", 0, 0, 0.0, 9.0) is state


def test_a_node_that_opens_begins_when_it_has_loaded() -> None:
    """Until then its works wait; a closed one takes none."""
    state = ClusterState.idle(profile(), 3).closed(2)
    assert state.is_open_N.tolist() == [True, True, False]
    opening = state.opening(2, ready_at=4.0)
    assert opening.num_open == 3
    assert trace(opening, work(), 2, 1.0).forward_S[0][0] == 4.0
    assert state.is_open_N.tolist() == [True, True, False]


def test_only_the_latest_is_remembered() -> None:
    """A state doesn't grow with what has ended."""
    state = ClusterState.idle(profile(), 1)
    for number in range(600):
        state = state.assigned(work(number), 0, float(number)).ended(str(number), 0, number + 0.5)
    assert len(state.history.arrivals) == len(state.history.responses) == 256
    assert state.history.num_requests == 600
    assert not state.nodes[0].committed
    assert np.isfinite(state.facts_FN).all()
