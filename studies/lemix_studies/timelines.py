"""What a picture of the stages' time shows: which stretch of it, what its rows and boxes are called."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import ceil, floor, log10, sqrt

from lemix_common.errors import BadInput
from lemix_studies.intervals import Interval
from lemix_studies.pieces import IDLENESS, INFERENCE, TRAINING, Piece

LONGEST_WINDOW_S = 20.0
WIDE_BOX = 1 / 60
"""Of a picture's width: in the window that is chosen, half of the busy time is in boxes at least this wide."""
_MOST_IDLE = 0.1
"""Of a window's length: more idleness of a kind on a node doesn't make the window more interesting."""


def extent(pieces: Sequence[Piece]) -> Interval:
    """From the first start to the last end of any work."""
    work = [piece for piece in pieces if not piece.is_idle]
    if not work:
        raise BadInput("there is nothing to draw: no stage has reported any work")
    return min(piece.start for piece in work), max(piece.end for piece in work)


def chosen_window(pieces: Sequence[Piece], start_s: float | None, end_s: float | None) -> Interval:
    """The window between two moments, those below 0 counted from the end of the last work.

    What isn't given is chosen: if neither is, a stretch in which much happens; after a start counted from the end, the
    end; else as much as reads well.
    """
    first, last = extent(pieces)
    length_s = window_length(pieces)
    if start_s is None and end_s is None:
        return interesting_window(pieces, length_s)
    start, end = (last + at if at is not None and at < 0 else at for at in (start_s, end_s))
    if start is None:
        start = (end or 0.0) - length_s
    if end is None:
        end = last if start_s is not None and start_s < 0 else start + length_s
    if not start < end or start >= last or end <= first:
        raise BadInput(
            f"there is nothing to draw between {start:g} and {end:g} s: work was done from {first:g} to {last:g} s"
        )
    return start, end


def window_length(pieces: Sequence[Piece]) -> float:
    """One in which half of the busy time is in boxes wide enough to tell apart, rounded down to one digit."""
    ascending = sorted(piece.seconds for piece in pieces if not piece.is_idle)
    sums = list(accumulate(ascending))
    middle_s = ascending[bisect_left(sums, sums[-1] / 2)]
    longest_s = max(middle_s, 1e-3) / WIDE_BOX
    digit_s = _digit(longest_s)
    first, last = extent(pieces)
    return min(floor(longest_s / digit_s) * digit_s, LONGEST_WINDOW_S, last - first)


def interesting_window(pieces: Sequence[Piece], length_s: float) -> Interval:
    """The stretch of that length, from a round moment on, in which most happens.

    On each node a little of every kind of work counts for more than much of one, and idleness should be seen too.
    """
    first, last = extent(pieces)
    if length_s >= last - first:
        return first, last
    tick = _digit(length_s) / 2
    num_ticks = round(length_s / tick)
    seconds: defaultdict[int, defaultdict[tuple[int, str], float]] = defaultdict(lambda: defaultdict(float))
    for piece in pieces:
        for number in range(floor(piece.start / tick), floor(piece.end / tick) + 1):
            overlap_s = min(piece.end, (number + 1) * tick) - max(piece.start, number * tick)
            seconds[number][piece.node, piece.category] += max(0.0, overlap_s)

    def interest(number: int) -> float:
        totals: defaultdict[tuple[int, str], float] = defaultdict(float)
        for later in range(number, number + num_ticks):
            for key, took_s in seconds.get(later, {}).items():
                totals[key] += took_s
        counted = (
            min(took_s, _MOST_IDLE * length_s) if category in IDLENESS else took_s
            for (_, category), took_s in totals.items()
        )
        return round(sum(map(sqrt, counted)), 9)

    earliest = floor(first / tick)
    latest = max(earliest, ceil(last / tick) - num_ticks)
    best = max(range(earliest, latest + 1), key=lambda number: (interest(number), -number))
    return best * tick, (best + num_ticks) * tick


def item_numbers(pieces: Iterable[Piece]) -> dict[str, str]:
    """What items are called on boxes: 7 for a request (7 +3 for an iteration of four), 7' for an example.

    It is the number at the end of their names where these differ in nothing else, otherwise the order of their first
    pieces, from 1.
    """
    of_kind: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for piece in pieces:
        if piece.item and piece.category != "optimizer" and not piece.is_idle:
            of_kind["'" if piece.category in TRAINING else ""][piece.item] = None
    return {
        item: f"{number}{mark}" for mark, items in of_kind.items() for item, number in _numbers(list(items))
    }


def role_of(pieces: Iterable[Piece]) -> str:
    """What a node does, by what it did: serves, trains, both or nothing."""
    did = {piece.category for piece in pieces}
    verbs = [verb for verb, kinds in (("serves", INFERENCE), ("trains", TRAINING)) if did.intersection(kinds)]
    return " and ".join(verbs) or "idle"


def shares_of(pieces: Iterable[Piece], window: Interval, num_stages: int) -> dict[str, float]:
    """The part of some stages' time in a window that each category took."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for piece in pieces:
        seconds[piece.category] += max(0.0, min(piece.end, window[1]) - max(piece.start, window[0]))
    return {category: took / (num_stages * (window[1] - window[0])) for category, took in seconds.items()}


def _numbers(items: Sequence[str]) -> list[tuple[str, int]]:
    parts = [re.fullmatch(r"(.*?)(\d+)", item) for item in items]
    if len({part[1] if part else item for part, item in zip(parts, items, strict=True)}) == 1 and all(parts):
        return [(item, int(part[2])) for part, item in zip(parts, items, strict=True) if part]
    return [(item, number) for number, item in enumerate(items, start=1)]


def _digit(length_s: float) -> float:
    """What a length's first digit stands for: 0.1 for 0.35."""
    return float(10.0 ** floor(log10(length_s)))
