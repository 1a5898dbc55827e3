from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_coordinator.scheduling.cluster_state import FEW_NODES, ClusterState
from lemix_coordinator.scheduling.columns import columns_of
from lemix_coordinator.scheduling.node_state import NodeState
from lemix_coordinator.scheduling.pass_times import iteration_of
from lemix_coordinator.scheduling.prediction import predict, trace
from scheduling_scene import HOP_S, filled, profile, work


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("nodes", [1, 3, 40])
def test_an_idle_node_answers_in_the_sum_of_its_stage_times(stages: int, nodes: int) -> None:
    """And of the hops between them, whatever the number of nodes; every stage follows the one before at once."""
    state = ClusterState.idle(profile(stages), nodes, now=5.0)
    one = work(lengths=(30, 70), at=5.0)
    seconds = sum(stage.forward.of(one.tokens, one.contexts) for stage in state.profile.stages)
    expected = seconds + HOP_S * (stages - 1)
    assert predict(state, one, 5.0).response_s == pytest.approx([expected] * nodes)
    assert trace(state, one, nodes - 1, 5.0).response_s == pytest.approx(expected)
    assert trace(state, one, nodes - 1, 5.0).waits_S == ("",) + ("immediate",) * (stages - 1)


def test_a_long_requests_chunks_are_on_several_stages_at_once() -> None:
    """The next stage is done a chunk after the one before; a request that fits into one pass is as ever."""
    state = ClusterState.idle(profile(), 1)
    lines = [stage.forward for stage in state.profile.stages]
    long = work(lengths=(300,))
    in_two, whole = replace(long, chunk_tokens=200), replace(long, chunk_tokens=300)
    assert trace(state, whole, 0, 0.0) == trace(state, long, 0, 0.0)
    spans = trace(state, in_two, 0, 0.0).forward_S
    assert spans[0][1] == pytest.approx(lines[0].of(300, 300**2) + lines[0].base)
    assert spans[1][0] == pytest.approx(
        lines[0].base + lines[0].token * 100 + lines[0].context * (300**2 - 200**2) + HOP_S
    )
    assert spans[1][1] < trace(state, long, 0, 0.0).forward_S[1][1] + 2 * lines[1].base
    columns = ClusterState.idle(profile(), FEW_NODES + 1)
    assert predict(columns, in_two, 0.0).response_s[0] == pytest.approx(spans[1][1])


def test_a_generation_ends_with_its_last_token() -> None:
    """An iteration through all stages for each token but the first, slower with the rows that decode there already."""
    state = ClusterState.idle(profile(), 2)
    one = work(kind="generate", new_tokens=11)
    prompt_s = predict(state, work(), 0.0).response_s[0]
    each_s = (predict(state, one, 0.0).response_s[0] - prompt_s) / 10
    assert each_s > sum(stage.decode.base for stage in state.profile.stages)
    busy = state.assigned(work(1, kind="generate", new_tokens=11), 0, 0.0)
    ended = busy.ended("1", 0, 1.0)
    assert predict(busy, one, 1.0).response_s[0] > predict(busy, one, 1.0).response_s[1]
    assert predict(ended, one, 1.0).response_s[0] == pytest.approx(predict(ended, one, 1.0).response_s[1])


STEPS = ((4, 4), (8, 1), (32, 4), (128, 16))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=20))
def test_an_iterations_rows_are_rounded_alike_everywhere(rows: list[int]) -> None:
    """Of one node or of many at once, as the sum of the stages' own times says."""
    one = profile()
    stages = tuple(replace(stage, row_steps=STEPS) for stage in one.stages)
    iteration = iteration_of(replace(one, stages=stages))
    found = iteration.of_all(np.array(rows, dtype=float), np.full(len(rows), 500.0))
    assert found.tolist() == pytest.approx([iteration.of(count, 500.0) for count in rows])
    for count in rows:
        hops_s = one.num_stages * HOP_S
        assert iteration.of(count, 500.0) == pytest.approx(
            sum(s.decode_s(count, 500.0) for s in stages) + hops_s
        )


@pytest.mark.parametrize("nodes", [1, FEW_NODES + 1])
def test_requests_do_not_wait_for_training_that_gives_way(nodes: int) -> None:
    """They are answered as on an idle node, and after each other; training waits for its own and for requests."""
    idle = ClusterState.idle(profile(), nodes, training_gives_way=True)
    trained = idle.assigned(work(0, kind="train"), 0, 0.0)
    request, step = work(2, lengths=(200,)), work(3, kind="train")
    alone_s = predict(idle, request, 0.0).response_s[0]
    assert predict(trained, request, 0.0).response_s.tolist() == pytest.approx([alone_s] * nodes)
    assert trace(trained, request, 0, 0.0).response_s == pytest.approx(alone_s)
    queued = trained.assigned(work(1, lengths=(200,)), 0, 0.0)
    assert predict(queued, request, 0.0).response_s[0] > alone_s
    assert trace(trained, step, 0, 0.0).backward_S[0][1] > trace(idle, step, 0, 0.0).backward_S[0][1]
    late = trained.forward_measured("0", 0, 0, 0.0, 9.0)
    assert predict(late, request, 0.0).response_s[0] == pytest.approx(alone_s)


def test_a_forward_waits_for_the_backward_that_it_would_run_into() -> None:
    """The far dependency: the request after a training work reaches the last stage when that one's backward runs."""
    state = ClusterState.idle(profile(), 1).assigned(work(0, kind="train"), 0, 0.0)
    backward = trace(ClusterState.idle(profile(), 1), work(0, kind="train"), 0, 0.0).backward_S
    after = trace(state, work(1, lengths=(200,)), 0, 0.0)
    assert after.waits_S == ("", "far")
    assert after.forward_S[1][0] == pytest.approx(backward[1][1])
    assert after.idle_s == pytest.approx(0.0)


def test_backwards_run_from_the_last_stage_to_the_first() -> None:
    """Each with the optimizer's step, and behind the forwards of its own stage."""
    way = trace(ClusterState.idle(profile(3), 1), work(0, kind="train"), 0, 0.0)
    assert way.backward_S[2][0] == pytest.approx(way.forward_S[2][1])
    assert way.backward_S[1][0] == pytest.approx(way.backward_S[2][1] + HOP_S)
    assert way.backward_S[0][0] == pytest.approx(way.backward_S[1][1] + HOP_S)


def test_predicting_leaves_no_trace() -> None:
    """Neither on the node that is chosen nor on the others: arrays and values stay what they were."""
    for nodes in (3, FEW_NODES + 3):
        state = filled(ClusterState.idle(profile(), nodes), 30)
        arrays = [state.facts_FN, state.is_open_N]
        if state.columns is not None:
            arrays += [state.columns.free_SN, state.columns.gaps_S3GN]
        before = (state.nodes, state.history, [array.copy() for array in arrays])
        first = predict(state, work(99, kind="train"), 0.1)
        for node in range(nodes):
            trace(state, work(99, kind="train"), node, 0.1)
            state.assigned(work(99, kind="train"), node, 0.1)
        again = predict(state, work(99, kind="train"), 0.1)
        assert (state.nodes, state.history) == before[:2]
        assert all(np.array_equal(now, then) for now, then in zip(arrays, before[2], strict=True))
        assert np.array_equal(first.response_s, again.response_s)


@pytest.mark.parametrize("seed", range(5))
def test_many_nodes_at_once_are_predicted_as_one_by_one(seed: int) -> None:
    """The arrays and the loop are one rule, to the last digits; with at most four backwards to come on a stage."""
    state = filled(ClusterState.idle(profile(3), FEW_NODES + 8), 60, seed=seed)
    few = tuple(_with_four_backwards(node) for node in state.nodes)
    state = replace(state, nodes=few, columns=columns_of(few))
    alone = replace(state, columns=None)
    for moment in (0.0, 0.05, 0.2):
        for kind in ("score", "train"):
            one = work(99, kind=kind, lengths=(50,))
            many, by_one = predict(state, one, moment), predict(alone, one, moment)
            assert many.response_s == pytest.approx(by_one.response_s)
            assert many.idle_s == pytest.approx(by_one.idle_s)


def _with_four_backwards(node: NodeState) -> NodeState:
    return replace(node, backwards_S=tuple(backwards[:4] for backwards in node.backwards_S))
