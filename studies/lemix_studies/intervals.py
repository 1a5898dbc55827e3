"""Sets of moments: sorted intervals that neither overlap nor touch, and what can be done with them."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]
"""From its first moment to just before its second."""
Moments = list[Interval]


def union(intervals: Iterable[Interval]) -> Moments:
    """Every moment of any of the intervals, which may come in any order and overlap."""
    joined: Moments = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def intersection(left: Moments, right: Moments) -> Moments:
    """The moments in both."""
    common: Moments = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(left: Moments, right: Moments) -> Moments:
    """The moments of the first that aren't in the second."""
    if not left:
        return []
    gaps: Moments = []
    free_from = left[0][0]
    for start, end in right:
        gaps.append((free_from, start))
        free_from = max(free_from, end)
    gaps.append((free_from, left[-1][1]))
    return intersection(left, [gap for gap in gaps if gap[0] < gap[1]])
