"""Where a stage's time went when it computed nothing, from what it and its neighbours computed.

A stage is idle while nothing runs on its worker. While something that the node has begun still has to come to the stage
(a token's next iteration, an activation, a gradient, the other nodes' part of a step), the stage waits on a neighbour:
that is *pipeline* idleness. Otherwise there is nothing for it to do: *serving* idleness, which more load would fill.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from lemix_studies.intervals import Interval, Moments, difference, intersection, union
from lemix_studies.pieces import IDLE_PIPELINE, IDLE_SERVING, Piece, Position

K = TypeVar("K")

SHORTEST_S = 1e-4
"""Less than this between two pieces is the loop's own time, not idleness."""


def idle_pieces(
    pieces: Sequence[Piece],
    positions: Iterable[Position],
    window: Interval,
    *,
    shortest_s: float = SHORTEST_S,
) -> list[Piece]:
    """The idleness of the stages at ``positions`` within the window; a stage without pieces has nothing to do."""
    busy_of_worker = {
        worker: union((piece.start, piece.end) for piece in own)
        for worker, own in _grouped(pieces, lambda piece: piece.worker).items()
        if worker
    }
    at_node = _grouped(pieces, lambda piece: piece.node)
    at_position = _grouped(pieces, lambda piece: piece.position)
    found = []
    for node, stage in positions:
        own = sorted(at_position.get((node, stage), []), key=lambda piece: piece.start)
        idle = difference([window], union(_busy(own, busy_of_worker)))
        awaited = union(_awaited(own, at_node.get(node, [])))
        for category, moments in (
            (IDLE_PIPELINE, intersection(idle, awaited)),
            (IDLE_SERVING, difference(idle, awaited)),
        ):
            found += [
                Piece(node=node, stage=stage, category=category, start=start, end=end)
                for start, end in moments
                if end - start >= shortest_s
            ]
    return sorted(found, key=lambda piece: piece.start)


def _busy(own: Sequence[Piece], busy_of_worker: Mapping[str, Moments]) -> Iterator[Interval]:
    """When the stage computed, or its worker did something else while it hosted the stage."""
    yield from ((piece.start, piece.end) for piece in own)
    stays = [(worker, list(during)) for worker, during in groupby(own, key=lambda piece: piece.worker)]
    hosted_from = float("-inf")
    for number, (worker, during) in enumerate(stays, start=1):
        hosted_to = float("inf") if number == len(stays) else during[-1].end
        yield from intersection(busy_of_worker.get(worker, []), [(hosted_from, hosted_to)])
        hosted_from = hosted_to


def _awaited(own: Iterable[Piece], of_node: Iterable[Piece]) -> Iterator[Interval]:
    """From when each unit of work begins on the node until it comes to the stage for the last time."""
    begun: dict[str, float] = {}
    for piece in of_node:
        for unit in piece.units:
            begun[unit] = min(piece.start, begun.get(unit, piece.start))
    last: dict[str, float] = {}
    for piece in own:
        for unit in piece.units:
            last[unit] = max(piece.start, last.get(unit, piece.start))
    return ((begun[unit], end) for unit, end in last.items())


def _grouped(pieces: Iterable[Piece], key: Callable[[Piece], K]) -> dict[K, list[Piece]]:
    groups: defaultdict[K, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[key(piece)].append(piece)
    return groups
