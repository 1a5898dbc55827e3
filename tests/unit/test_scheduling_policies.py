from __future__ import annotations

import importlib.metadata
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies import ENTRY_POINTS, POLICY_NAMES, PolicyOptions, make_policy
from lemix_coordinator.scheduling.policies.lemix import request_cost
from lemix_coordinator.scheduling.policies.lemix_paper import paper_cost
from lemix_coordinator.scheduling.policies.lemix_prototype import score
from scheduling_scene import filled, placements, profile, work, works

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_equal_seeds_make_equal_decisions(name: str) -> None:
    """Of equal works in equal states; every work goes to an open node, or waits with a reason."""
    options = PolicyOptions(seed=3, use_nodes=2, slo_s=0.1)
    state = ClusterState.idle(profile(), 4)
    first = placements(make_policy(name, options), state, works(80))
    assert first == placements(make_policy(name, options), state, works(80))
    assert {node for node in first if node is not None} <= set(range(4))
    closed = state.closed(0).closed(1)
    assert set(placements(make_policy(name, options), closed, works(80))) <= {2, 3, None}


def test_another_seed_draws_otherwise() -> None:
    """Only `random` has randomness."""
    state = ClusterState.idle(profile(), 4)
    by_seed = {
        name: [placements(make_policy(name, PolicyOptions(seed=seed)), state, works(40)) for seed in (0, 1)]
        for name in ("random", "lemix")
    }
    assert by_seed["random"][0] != by_seed["random"][1]
    assert by_seed["lemix"][0] == by_seed["lemix"][1]


@pytest.mark.parametrize("prefer", ["nodes", "balanced", "speed"])
def test_a_longer_response_costs_more_with_lemix(prefer: str) -> None:
    """Strictly, all else equal; whatever is preferred."""
    cost_N = request_cost(prefer, np.linspace(0.1, 50, 40), np.zeros(40))  # type: ignore[arg-type]
    assert (np.diff(cost_N) > 0).all()


def test_a_longer_response_costs_more_with_the_papers_cost() -> None:
    """Strictly, all else equal."""
    state = filled(ClusterState.idle(profile(), 40), 40)
    even = replace(state, facts_FN=np.repeat(state.facts_FN[:, :1], 40, axis=1))
    cost_N = paper_cost(
        PolicyOptions(),
        even,
        work(),
        0.0,
        response_N=np.linspace(0.1, 50, 40),
        idle_N=np.zeros(40),
        service_s=0.1,
    )
    assert (np.diff(cost_N) > 0).all()


def test_the_prototypes_score_rises_with_the_response() -> None:
    """The error that makes it feed the busiest node: a negative number ÷ the response time."""
    options = PolicyOptions()
    scores = [score(options, profit=-0.2, density=0.001, response_s=seconds) for seconds in (0.05, 1.0, 3.0)]
    assert scores == sorted(scores)
    assert scores == pytest.approx([-26.66, -1.333, -0.444], rel=0.01)


@pytest.mark.parametrize("rate", [4.0, 16.0, 32.0])
def test_the_prototype_feeds_one_node(rate: float) -> None:
    """All others look too fast to it, at any rate."""
    state = ClusterState.idle(profile(), 4)
    options = PolicyOptions(prioritises=False)
    assert set(placements(make_policy("lemix-prototype", options), state, works(150, rate=rate))) == {0}


def test_separate_splits_as_the_paper() -> None:
    """Banker's rounding, one node on each side at least, the first ones serve; one node does both."""
    split = {}
    for rate in (0.1, 0.3, 0.5, 0.7, 0.9):
        policy = make_policy("separate", PolicyOptions(training_rate=rate))
        served = {policy.place(ClusterState.idle(profile(), 4), work(n), 0.0).node for n in range(8)}
        trains = {
            policy.place(ClusterState.idle(profile(), 4), work(n, kind="train"), 0.0).node for n in range(8)
        }
        assert not served & trains
        assert served | trains == {0, 1, 2, 3}
        split[rate] = len(served)
    assert split == {0.1: 3, 0.3: 3, 0.5: 2, 0.7: 1, 0.9: 1}
    alone = make_policy("separate", PolicyOptions())
    assert alone.place(ClusterState.idle(profile(), 1), work(kind="train"), 0.0).node == 0


def test_separate_dynamic_serves_with_more_nodes_when_requests_are_many() -> None:
    """A quarter up to 15 requests a second, then a half."""
    policy = make_policy("separate-dynamic", PolicyOptions())
    for rate, serving in ((8.0, {0}), (60.0, {0, 1})):
        load = works(60, rate=rate, training=0.0)
        assert set(placements(policy, ClusterState.idle(profile(), 4), load)[40:]) == serving


def test_the_plain_policies_do_as_they_are_called() -> None:
    """Turns by number, the first nodes of a `+`, the shortest queue, the least memory."""
    state = ClusterState.idle(profile(), 4)
    options = PolicyOptions(use_nodes=3)
    assert placements(make_policy("naive-mix", PolicyOptions()), state, works(8)) == [0, 1, 2, 3] * 2
    assert set(placements(make_policy("random+", options), state, works(60))) == {0, 1, 2}
    assert placements(make_policy("jsq", PolicyOptions()), state, works(8)) == [0, 1, 2, 3] * 2
    heavy = state.assigned(work(0, lengths=(900,)), 0, 0.0).assigned(work(1), 1, 0.0)
    assert make_policy("luf+", PolicyOptions(use_nodes=2)).place(heavy, work(2), 0.0).node == 1


def test_lemix_spoils_one_nodes_answers_in_a_burst_and_not_all() -> None:
    """What can't be in time goes where requests are late already."""
    policy = make_policy("lemix", PolicyOptions(slo_s=0.1))
    nodes = placements(policy, ClusterState.idle(profile(), 4), works(200, rate=1e6, training=0.0))
    counts = sorted(Counter(nodes).values())
    assert counts[-1] > 100
    assert counts[2] <= 20


def test_lemix_puts_training_off_while_all_nodes_are_pressed() -> None:
    """For a bounded time; not at all with `speed`, nor where prioritising is off."""
    options = PolicyOptions(slo_s=0.1)
    state = filled(ClusterState.idle(profile(), 2), 60)
    one = work(99, kind="train")
    assert make_policy("lemix", options).place(state, one, 0.0).node is None
    assert make_policy("lemix", options).place(state, replace(one, arrived_at=-2.1), 0.0).node is not None
    for other in (replace(options, prefer="speed"), replace(options, prioritises=False)):
        assert make_policy("lemix", other).place(state, one, 0.0).node is not None


def test_lemix_closes_nodes_that_it_does_not_need_and_opens_them_when_requests_are_late() -> None:
    """Nothing before it has seen arrivals for a while; with `speed` one more, for training."""
    state = ClusterState.idle(profile(), 4)
    slo_s = 0.1
    for one in works(20, rate=20.0):
        state = state.assigned(one, one.number % 4, one.arrived_at).ended(
            one.item, one.number % 4, one.arrived_at + 0.02
        )
    lean = {
        prefer: make_policy("lemix", PolicyOptions(slo_s=slo_s, prefer=prefer))
        for prefer in ("nodes", "speed")
    }
    assert lean["nodes"].resize(ClusterState.idle(profile(), 4), (), 0.0).close == ()
    assert len(lean["nodes"].resize(state, (), 1.1).close) == 3
    assert len(lean["speed"].resize(state, (), 1.1).close) == 2
    late = state.closed(1).closed(2).closed(3)
    for one in works(40, rate=400.0, training=0.0, seed=1):
        at = 2.0 + one.arrived_at
        late = late.assigned(replace(one, item=f"late-{one.number}", arrived_at=at), 0, at)
        late = late.ended(f"late-{one.number}", 0, at + 0.4)
    assert lean["nodes"].resize(late, (), 2.6).open != ()


@pytest.mark.parametrize("name", ["lemix", "lemix-paper"])
def test_a_node_without_room_is_passed_over(name: str) -> None:
    """Unless memory isn't checked; where no node has any the work waits, but an empty node takes anything."""
    state = ClusterState.idle(profile(), 2).assigned(work(0, kind="train", lengths=(4000,)), 0, 0.0)
    heavy = work(1, kind="train", lengths=(3500,))
    options = PolicyOptions(prioritises=False, slo_s=100.0)
    assert make_policy(name, options).place(state, heavy, 5.0).node == 1
    full = state.assigned(heavy, 1, 5.0)
    assert make_policy(name, options).place(full, heavy, 9.0).node is None
    assert make_policy(name, replace(options, checks_memory=False)).place(full, heavy, 9.0).node is not None


def test_an_own_policy_plugs_in_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's: each work goes where it ends first."""
    policy_class = runpy.run_path(str(ROOT / "examples/own_policy.py"))["FirstDone"]

    class Entry:
        name = "first-done"

        def load(self) -> object:
            return policy_class

    monkeypatch.setattr(
        "lemix_coordinator.scheduling.policies.entry_points",
        lambda group: [Entry()] if group == ENTRY_POINTS else importlib.metadata.entry_points(group=group),
    )
    policy = make_policy("first-done", PolicyOptions())
    state = ClusterState.idle(profile(), 3).assigned(work(0), 0, 0.0)
    assert policy.place(state, work(1), 0.0).node == 1


def test_an_unknown_policy_is_refused() -> None:
    """With the names that there are."""
    with pytest.raises(BadInput, match="no policy is called 'best'; there are separate, "):
        make_policy("best", PolicyOptions())
