"""What some stages did with all their time, work and idleness: what timelines and trace.json are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lemix_common.errors import BadInput
from lemix_studies.idleness import idle_pieces
from lemix_studies.pieces import Piece, Position, pieces_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The pieces of some stages, in order of their start."""

    pieces: Sequence[Piece]
    positions: Sequence[Position]
    """Of all stages, also of those that did nothing."""
    title: str = ""
    clock: str = "seconds"
    """What the times count from."""

    def of_nodes(self, nodes: Iterable[int]) -> Recording:
        """The part of some nodes; all of it if none is named."""
        wanted = set(nodes)
        unknown = wanted - {node for node, _ in self.positions}
        if unknown:
            known = ", ".join(str(node) for node in sorted({node for node, _ in self.positions}))
            raise BadInput(f"there is no node {min(unknown)} in what was recorded (nodes: {known})")
        if not wanted:
            return self
        return replace(
            self,
            pieces=[piece for piece in self.pieces if piece.node in wanted],
            positions=[position for position in self.positions if position[0] in wanted],
        )


def recording_of(
    spans: Iterable[Mapping[str, Any]],
    *,
    zero: float | None = None,
    steps: Mapping[str, Sequence[str]] | None = None,
    nodes: int = 0,
    title: str = "",
    clock: str = "seconds",
) -> Recording:
    """Of spans of the events stream; idleness is counted from ``zero`` (see `pieces_of`) to the last work's end.

    ``nodes`` is how many there are, if some may have had nothing to do.
    """
    work = pieces_of(spans, zero=zero, steps=steps)
    busy = {piece.position for piece in work}
    num_nodes = max([nodes, *(node + 1 for node, _ in busy)])
    num_stages = max((stage + 1 for _, stage in busy), default=0)
    positions = [(node, stage) for node in range(num_nodes) for stage in range(num_stages)]
    window = (0.0, max((piece.end for piece in work), default=0.0))
    pieces = sorted([*work, *idle_pieces(work, positions, window)], key=lambda piece: piece.start)
    return Recording(pieces=pieces, positions=positions, title=title, clock=clock)
