from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lemix_studies.intervals import Interval, Moments, difference, intersection, union

INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8)


def seconds(intervals: list[Interval]) -> set[int]:
    """The whole seconds within some intervals."""
    return {second for start, end in intervals for second in range(int(start), int(end))}


def is_normal(moments: Moments) -> bool:
    """Sorted, not empty, neither overlapping nor touching."""
    edges = [edge for interval in moments for edge in interval]
    return edges == sorted(set(edges))


@given(INTERVALS)
def test_a_union_has_the_same_moments_in_order(intervals: list[Interval]) -> None:
    """Whatever the order and the overlaps; intervals that end before they begin are empty."""
    joined = union(intervals)
    assert is_normal(joined)
    assert seconds(joined) == seconds(intervals)


@given(INTERVALS, INTERVALS)
def test_sets_of_moments_behave_like_sets(left: list[Interval], right: list[Interval]) -> None:
    """Intersection and difference are those of the moments within."""
    both, rest = intersection(union(left), union(right)), difference(union(left), union(right))
    assert seconds(both) == seconds(left) & seconds(right)
    assert seconds(rest) == seconds(left) - seconds(right)
    assert is_normal(both)
    assert is_normal(rest)
