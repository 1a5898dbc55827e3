"""A simulated run, moment by moment, as pictures of recordings need it."""

from __future__ import annotations

from lemix_studies.experiments.runners import CloseUp
from lemix_studies.experiments.settings import Point
from lemix_studies.idleness import idle_pieces
from lemix_studies.pieces import Piece
from lemix_studies.recordings import Recording
from lemix_studies.simulator import Outcome


def close_up_of(outcome: Outcome, point: Point, *, num_stages: int) -> CloseUp:
    """Of an outcome whose intervals were kept; time counts from the first arrival."""
    zero = outcome.began_at
    pieces = [
        Piece(
            node=one.node,
            stage=one.stage,
            category=one.cat,
            start=one.began - zero,
            end=one.ended - zero,
            item=one.item,
            unit=one.item,
            others=one.others,
        )
        for one in outcome.intervals
    ]
    positions = [(node, stage) for node in range(point.setting.nodes) for stage in range(num_stages)]
    idle = idle_pieces(pieces, positions, (0.0, outcome.duration_s))
    recording = Recording(
        pieces=sorted([*pieces, *idle], key=lambda piece: piece.start),
        positions=positions,
        title=point.variant.label,
        clock="seconds since the first item",
    )
    ended = {
        (one.node, one.stage, one.item): one.ended - zero for one in outcome.intervals if _is_forward(one.cat)
    }
    far, immediate = [], []
    for one in outcome.intervals:
        if one.waited_for == "far":
            could_s = ended.get((one.node, one.stage - 1, one.item), one.began - zero)
            far.append((one.node, one.stage, min(could_s, one.began - zero), one.began - zero))
        elif one.waited_for == "immediate":
            immediate.append((one.node, one.stage, one.began - zero))
    return CloseUp(
        recording=recording,
        held=tuple((node, since - zero, to - zero) for node, since, to in outcome.held),
        far=tuple(far),
        immediate=tuple(immediate),
    )


def _is_forward(category: str) -> bool:
    return category in {"prefill", "training_forward"}
