from __future__ import annotations

from typing import Any

from lemix_studies.pieces import Piece, pieces_of
from lemix_studies.recordings import recording_of


def span(category: str, item: str, start: float, **other: Any) -> dict[str, Any]:
    """As a worker reports it; it takes half a second."""
    known = {
        "node": 0,
        "stage": 1,
        "worker": "w",
        "cat": category,
        "item": item,
        "version": "0.2",
        "blocked_s": 0.0,
    }
    return {**known, "start": start, "end": start + 0.5, **other}


def test_time_counts_from_the_moment_that_is_given() -> None:
    """What began before it is left out; pieces are in the order of their starts."""
    pieces = pieces_of(
        [span("decode", "b", 103), span("prefill", "b", 102), span("prefill", "a", 99)], zero=100
    )
    assert [(piece.item, piece.category, piece.start, piece.end) for piece in pieces] == [
        ("b", "prefill", 2.0, 2.5),
        ("b", "decode", 3.0, 3.5),
    ]


def test_time_counts_from_the_first_start_by_default() -> None:
    """Nothing is left out."""
    assert [piece.start for piece in pieces_of([span("decode", "b", 103), span("prefill", "b", 102)])] == [
        0.0,
        1.0,
    ]


def test_a_microbatch_is_called_by_its_example() -> None:
    """Its unit is the step; an optimizer's item is the step, and what isn't known keeps its own name."""
    spans = [
        span("training_forward", "main:3:1", 1),
        span("training_backward", "main:4:0", 2),
        span("optimizer", "main:3", 3),
    ]
    pieces = pieces_of(spans, steps={"main:3": ["a", "b"]})
    assert [(piece.item, piece.unit) for piece in pieces] == [
        ("b", "main:3"),
        ("main:4:0", "main:4"),
        ("main:3", "main:3"),
    ]


def test_a_request_is_its_own_unit() -> None:
    """All its tokens; who computed them and with which weights is kept."""
    assert pieces_of([span("decode", "a:b", 1)]) == [
        Piece(
            node=0,
            stage=1,
            category="decode",
            start=0.0,
            end=0.5,
            worker="w",
            item="a:b",
            unit="a:b",
            version="0.2",
        )
    ]


def test_a_recording_has_every_stage_of_every_node() -> None:
    """Nodes that did nothing too, idle from the moment that is given to the last work's end."""
    recording = recording_of([span("prefill", "a", 101)], zero=100, nodes=2)
    assert list(recording.positions) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(p.position, p.category, p.start, p.end) for p in recording.of_nodes([1]).pieces] == [
        ((1, 0), "idle_serving", 0.0, 1.5),
        ((1, 1), "idle_serving", 0.0, 1.5),
    ]


def test_nothing_is_a_recording_too() -> None:
    """A cluster that did nothing has no stages that are known."""
    recording = recording_of([], nodes=2)
    assert (list(recording.pieces), list(recording.positions)) == ([], [])
