"""Cutting layers into stages."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.errors import ModelError
from lemix_common.partition import cut_layers


def test_equal_layers_are_cut_evenly() -> None:
    """Where nothing distinguishes the layers, stages have equal length."""
    assert cut_layers([1] * 6, 3) == (range(2), range(2, 4), range(4, 6))


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    """The head's cost counts as the last stage's."""
    assert cut_layers([1] * 8, 3, last_extra=2) == (range(3), range(3, 6), range(6, 8))


def test_a_heavy_embedding_takes_layers_from_the_first_stage() -> None:
    """The embedding's cost counts as the first stage's."""
    assert cut_layers([1] * 9, 3, first_extra=3) == (range(1), range(1, 5), range(5, 9))


def test_one_stage_has_everything_and_as_many_stages_as_layers_have_one_each() -> None:
    """The two ends of what is possible."""
    assert cut_layers([3, 1, 2], 1, first_extra=9, last_extra=9) == (range(3),)
    assert cut_layers([3, 1, 2], 3, first_extra=9, last_extra=9) == (range(1), range(1, 2), range(2, 3))


def test_a_stage_that_is_costly_anyway_does_not_unbalance_the_others() -> None:
    """Where one layer decides the maximum, the remaining stages are still as even as can be."""
    assert cut_layers([9, 1, 1, 1, 1], 3) == (range(1), range(1, 3), range(3, 5))


@pytest.mark.parametrize("stages", [-1, 0, 4])
def test_an_impossible_number_of_stages_is_refused(stages: int) -> None:
    """No stage may be empty, and the message says what is possible."""
    with pytest.raises(ModelError, match="choose 1 to 3 stages"):
        cut_layers([1, 1, 1], stages)


@given(
    costs=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    extras=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    choose=st.data(),
)
def test_no_other_cut_has_a_cheaper_worst_stage(
    costs: list[int], extras: tuple[int, int], choose: st.DataObject
) -> None:
    """The cut is contiguous, complete, and as good as the best of all cuts, in maximum and then in evenness."""
    stages = choose.draw(st.integers(1, len(costs)))

    def quality(borders: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(costs[start:stop]) for start, stop in pairwise(borders)]
        sums[0] += extras[0]
        sums[-1] += extras[1]
        return max(sums), sum(cost * cost for cost in sums)

    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    cut = cut_layers(costs, stages, first_extra=extras[0], last_extra=extras[1])
    assert [layer for layers in cut for layer in layers] == list(range(len(costs)))
    assert quality((0, *(layers.stop for layers in cut))) == min(map(quality, every))
