from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from lemix_common.errors import SettingsError
from lemix_common.settings import POLICIES, ClusterSettings
from lemix_common.store.training import PlannedStep
from lemix_coordinator.expectations import IdleTimes, objective_of
from lemix_coordinator.scheduler import policy_of, shard_works, work_of
from lemix_coordinator.scheduling.live import LiveState, is_training, neutral_profile, shard_name
from lemix_coordinator.scheduling.pass_times import pass_times
from lemix_coordinator.scheduling.policies import POLICY_NAMES
from lemix_coordinator.scheduling.work import Work
from toy_profile import STAGE, toy_profile

PROFILE = toy_profile(2)


def request(item: str, tokens: int = 40, new_tokens: int = 0) -> Work:
    """A request of so many tokens."""
    return Work(
        item=item,
        number=0,
        kind="generate" if new_tokens else "score",
        lengths=(tokens,),
        arrived_at=0.0,
        new_tokens=new_tokens,
    )


def ready_state(nodes: int = 2) -> LiveState:
    """All nodes ready at 0."""
    return LiveState.begin(PROFILE, nodes, 0.0).with_ready(range(nodes), 0.0)


def test_only_ready_nodes_take_work() -> None:
    """None at the beginning; one that is lost takes none any more, until it is back."""
    state = LiveState.begin(PROFILE, 3, 0.0)
    assert state.cluster.num_open == 0
    state = state.with_ready({0, 2}, 0.0)
    assert state.cluster.is_open_N.tolist() == [True, False, True]
    assert state.with_ready({2}, 1.0).cluster.is_open_N.tolist() == [False, False, True]


def test_what_a_stream_no_longer_holds_has_ended() -> None:
    """And what only the stream knows is on its node: a new leader finds the old one's work."""
    state = ready_state().with_work(request("a"), 0, 0.0).with_work(request("b"), 1, 0.0)
    state = state.with_outstanding({"b": 1, "c": 0}, [(request("c"), 0)], 1.0)
    assert dict(state.where) == {"b": 1, "c": 0}
    assert state.cluster.unfinished_N.tolist() == [1, 1]


def test_a_moved_request_is_on_one_node() -> None:
    """Its old node has nothing of it."""
    state = ready_state().with_work(request("a"), 0, 0.0).with_work(request("a"), 1, 1.0)
    assert state.cluster.unfinished_N.tolist() == [0, 1]


def test_steps_stay_while_requests_end() -> None:
    """A step's shards are in no stream."""
    shard = Work(item=shard_name("main", 3, 0), number=0, kind="train", lengths=(40,), arrived_at=0.0)
    assert is_training(shard.item)
    state = ready_state().with_work(shard, 1, 0.0).with_outstanding({}, [], 1.0)
    assert dict(state.where) == {shard.item: 1}


def test_an_idle_node_is_free_whatever_was_predicted() -> None:
    """What was predicted too long doesn't keep the next one away."""
    state = ready_state()
    for number in range(20):
        state = state.with_work(request(f"r{number}", tokens=500), 0, 0.0)
    assert max(state.cluster.nodes[0].free_S) > 1.0
    state = state.with_outstanding({}, [], 0.5)
    assert max(state.cluster.nodes[0].free_S) <= 0.5


def test_spans_put_costs_right() -> None:
    """Stages that take three times as long as the profile says are soon known to."""
    state = ready_state()
    for number in range(60):
        tokens = 20 + 10 * (number % 8)
        seconds = 3 * STAGE.forward.of(tokens, tokens**2)
        span = {
            "node": 0, "stage": 0, "cat": "prefill", "item": "x", "start": 1.0, "end": 1.0 + seconds,
            "tokens": tokens, "contexts": tokens**2,
        }  # fmt: skip
        state = state.with_spans([span], MappingProxyType({}))
    assert state.base == PROFILE
    known = state.cluster.profile.stages[0].forward.of(50, 2500)
    assert known == pytest.approx(3 * STAGE.forward.of(50, 2500), rel=0.1)
    assert state.cluster.profile.stages[1].forward == STAGE.forward


def test_an_expected_end_learns_from_answers() -> None:
    """Requests that take 40 ms more than their stages are soon expected to; those before keep what was said of them."""
    state, work = ready_state(1), request("w")
    plain_s = state.end_of(work, 0, 0.0)
    for number in range(60):
        at = float(number)
        one = replace(request(f"r{number}", tokens=20 + 10 * (number % 8)), arrived_at=at)
        alone_s = state.with_work(one, 0, at).cluster.nodes[0].committed[0].alone_s
        state = state.with_work(one, 0, at).with_answer(one.item, at + alone_s + 0.04)
        assert one.item not in state.where
    later = replace(work, arrived_at=60.0)
    assert state.end_of(later, 0, 60.0) - 60.0 == pytest.approx(plain_s + 0.04, rel=0.1)
    assert state.with_answer("unknown", 1.0) is state


def test_nothing_known_is_layers_and_endless_memory() -> None:
    """More layers take longer; no work is too large."""
    profile = neutral_profile([1, 3])
    assert profile.stages[1].forward.of(10, 100) == pytest.approx(3 * profile.stages[0].forward.of(10, 100))
    assert LiveState.begin(profile, 1, 0.0).cluster.room_bytes > 2**60


def test_a_request_by_its_hash() -> None:
    """A generation's tokens are its prompt's, without those it may have."""
    score = work_of("a", {"kind": "score", "tokens": "30", "accepted_at": "5.5"}, 3)
    assert (score.kind, score.lengths, score.arrived_at, score.number) == ("score", (30,), 5.5, 3)
    written = work_of("b", {"kind": "generate", "tokens": "30", "max_new_tokens": "10"}, 4)
    assert (written.kind, written.lengths, written.new_tokens) == ("generate", (20,), 10)


def test_a_step_is_as_many_pieces_as_it_has_shards() -> None:
    """Each with its examples; those that are left out count for nothing."""
    planned = PlannedStep(
        run="main", step=2, items=("a", "b", "c"), cuts=(1, 1, 1), shards=(0, 0, 1), reference_tokens=3,
        learning_rate=0.1, weight_decay=0.0, seed=0, excluded=(2,),
    )  # fmt: skip
    first, second = shard_works(planned, [10, 20, 30], 1.0)
    assert first is not None
    assert (first.lengths, first.item) == ((10, 20), "step:main:2:0")
    assert second is None


def test_an_objective_is_five_idle_times_or_what_was_set() -> None:
    """Without a profile only what was set."""
    cluster = ready_state().cluster
    idle = IdleTimes().with_request(cluster, request("a", 40)).with_request(cluster, request("b", 80))
    mean = sum(pass_times(PROFILE, request("r", tokens)).idle_s for tokens in (40, 80)) / 2
    assert idle.forward_s == pytest.approx(mean)
    about = objective_of(request("c"), idle, slo_s=0.0, has_profile=True)
    assert float(about["slo_s"]) == pytest.approx(5 * mean, abs=1e-5)
    assert objective_of(request("c"), idle, slo_s=0.0, has_profile=False) == {}
    assert objective_of(request("c"), idle, slo_s=2.0, has_profile=False) == {"slo_s": "2.000000"}
    written = objective_of(request("d", 20, 8), idle, slo_s=0.0, has_profile=True)
    assert set(written) == {"slo_ttft_s", "slo_itl_s"}


def test_the_settings_know_every_policy() -> None:
    """They may not import the policies, so they have a list of their own."""
    assert sorted(POLICIES) == sorted(POLICY_NAMES)
    for name in POLICIES:
        slo_s = 0.5
        assert policy_of(ClusterSettings(model="m", nodes=4, policy=name), slo_s).name == name
    with pytest.raises(SettingsError, match="policy = lemmix: must be one of"):
        ClusterSettings(model="m", policy="lemmix")
