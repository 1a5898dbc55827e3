from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.settings import ClusterSettings
from lemix_coordinator.policies import place_item, share_step


def settings_of(policy: str, nodes: int = 4, **changes: float) -> ClusterSettings:
    """A cluster with a policy."""
    return ClusterSettings(model="m", nodes=nodes, policy=policy, **changes)  # type: ignore[arg-type]


def test_naive_mix_takes_ready_nodes_in_turn() -> None:
    """Every ready node, whether it trains or not."""
    settings = settings_of("naive-mix")
    assert [place_item(settings, [0, 2, 3], k) for k in range(7)] == [0, 2, 3, 0, 2, 3, 0]


def test_separate_keeps_items_off_training_nodes() -> None:
    """Serving nodes in turn; a training node only where no serving node is ready."""
    settings = settings_of("separate")
    assert (settings.serving_nodes, settings.training_nodes) == ((0, 1), (2, 3))
    assert [place_item(settings, [0, 1, 2, 3], k) for k in range(4)] == [0, 1, 0, 1]
    assert [place_item(settings, [2, 3], k) for k in range(3)] == [2, 3, 2]


@pytest.mark.parametrize(
    ("nodes", "share", "training"),
    [(2, 0.5, (1,)), (2, 0.99, (1,)), (2, 0.01, (1,)), (3, 0.5, (1, 2)), (8, 0.25, (6, 7))],
)
def test_separate_always_leaves_a_node_for_each(nodes: int, share: float, training: tuple[int, ...]) -> None:
    """At least one node serves and at least one trains."""
    settings = settings_of("separate", nodes, training_share=share)
    assert settings.training_nodes == training
    assert sorted((*settings.serving_nodes, *settings.training_nodes)) == list(range(nodes))


def test_random_is_fixed_by_the_seed() -> None:
    """The same items go to the same nodes again; another seed deals otherwise."""
    deals = {
        seed: [place_item(settings_of("random", seed=seed), [0, 1, 2, 3], k) for k in range(50)]
        for seed in (0, 1)
    }
    assert deals[0] == [place_item(settings_of("random", seed=0), [0, 1, 2, 3], k) for k in range(50)]
    assert deals[0] != deals[1]
    assert set(deals[0]) == {0, 1, 2, 3}


@given(
    st.sampled_from(["naive-mix", "separate", "random"]),
    st.lists(st.integers(0, 3), unique=True).map(sorted),
    st.integers(0, 99),
)
def test_only_ready_nodes_get_items(policy: str, ready: list[int], sequence: int) -> None:
    """Without one the item waits."""
    chosen = place_item(settings_of(policy), ready, sequence)
    assert (chosen in ready) if ready else (chosen is None)


@given(
    st.sampled_from(["naive-mix", "random"]),
    st.lists(st.integers(0, 3), unique=True, min_size=1).map(sorted),
    st.integers(1, 9),
    st.integers(1, 99),
)
def test_every_shard_goes_to_a_member(policy: str, members: list[int], shards: int, step: int) -> None:
    """As many entries as virtual shards, all of them members; drawn again, the same."""
    nodes = share_step(settings_of(policy), members, step, shards=shards)
    assert len(nodes) == shards
    assert set(nodes) <= set(members)
    assert nodes == share_step(settings_of(policy), members, step, shards=shards)


@given(st.lists(st.integers(0, 3), unique=True, min_size=1).map(sorted), st.integers(1, 9))
def test_naive_mix_shares_a_step_evenly(members: list[int], shards: int) -> None:
    """Each member gets neighbouring shards, as many as the others or one more; over some steps all get the same."""
    nodes = share_step(settings_of("naive-mix"), members, 1, shards=shards)
    counts = Counter(dict.fromkeys(members, 0)) + Counter(nodes)
    assert list(nodes) == sorted(nodes)
    assert max(counts[m] for m in members) - min(counts[m] for m in members) <= 1
    steps = range(1, len(members) + 1)
    in_all = Counter(
        m for step in steps for m in share_step(settings_of("naive-mix"), members, step, shards=shards)
    )
    assert set(in_all.values()) == {shards}
