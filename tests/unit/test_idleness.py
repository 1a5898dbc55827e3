from __future__ import annotations

from dataclasses import replace

import pytest

from lemix_studies.idleness import SHORTEST_S, idle_pieces
from lemix_studies.pieces import IDLE_SERVING
from stage_rows import drawn, idle_rows


def test_requests_that_pass_through_once() -> None:
    """Before a request is on the node its stages have nothing to do; from then on they wait for it."""
    pieces = drawn(
        "..1....2",
        ".1....2.",
        "1....2..",
    )
    assert idle_rows(pieces, stages=3, seconds=8) == [
        "pp.sspp.",
        "p.sssp.s",
        ".ssss.ss",
    ]


def test_a_generation_returns_to_stage_0() -> None:
    """While its next token is computed elsewhere, every stage it will come to again waits for it."""
    pieces = drawn(
        ".1.1.1..",
        "1.1.1...",
    )
    assert idle_rows(pieces, stages=2, seconds=8) == [
        "p.p.p.ss",
        ".p.p.sss",
    ]


def test_every_request_of_an_iteration_is_awaited() -> None:
    """Also where another one is the first that a box names."""
    alone = drawn(
        ".1..2...",
        "1..2....",
    )
    both = [replace(piece, others=("r-3",)) for piece in alone]
    assert idle_rows(alone, stages=2, seconds=6) == ["p.sp.s", ".ss.ss"]
    assert idle_rows(both, stages=2, seconds=6) == ["p.pp.s", ".pp.ss"]


def test_a_step_is_awaited_until_its_optimizer() -> None:
    """Between forward and backward, and between backward and the step's commit, its stages wait for neighbours."""
    pieces = drawn(
        "..abAB..#...",
        ".ab..AABB.#.",
        "ab.....A..B#",
    )
    assert idle_rows(pieces, stages=3, seconds=12) == [
        "pp....pp.sss",
        "p..pp....p.s",
        "..ppppp.pp..",
    ]


def test_one_item_in_flight_hides_that_there_is_no_other() -> None:
    """Stage 0 is done with the request: that it is in flight elsewhere is no reason to wait."""
    assert idle_rows(drawn("...11", "11..."), stages=2, seconds=5) == ["ppp..", "..sss"]


def test_a_stage_without_work_has_nothing_to_do() -> None:
    """All the time, also if its whole node has none."""
    assert idle_rows(drawn("....", "1..."), stages=2, seconds=4) == ["ssss", ".sss"]
    assert idle_rows(drawn("1..."), stages=1, seconds=4, node=1) == ["ssss"]


def test_other_nodes_work_is_not_waited_for() -> None:
    """An item that was tried elsewhere before begins on this node when its stage 0 does."""
    pieces = drawn("1....", node=1) + drawn("...1", "..1.", node=0)
    assert idle_rows(pieces, stages=2, seconds=4) == ["ssp.", "ss.s"]


def test_a_busy_worker_has_no_idle_stages() -> None:
    """Of two stages on one worker neither could work while the other does."""
    pieces = drawn("..1..", ".1...", workers=["w", "w"])
    assert idle_rows(pieces, stages=2, seconds=5) == ["s..ss", "s..ss"]


def test_a_worker_counts_while_it_hosts_the_stage() -> None:
    """What a worker did before it took a stage over says nothing about that stage."""
    first = drawn("....", "1...", workers=["a", "b"])
    other = [replace(piece, stage=1, worker="b") for piece in drawn(".2..")]
    moved = [replace(piece, worker="b") for piece in drawn("...3")]
    assert idle_rows(first + other + moved, stages=1, seconds=4) == ["..s."]


def test_the_window_cuts_idleness() -> None:
    """Only what lies within is counted."""
    idle = idle_pieces(drawn("1....2"), [(0, 0)], (2.0, 4.5))
    assert [(piece.category, piece.start, piece.end) for piece in idle] == [(IDLE_SERVING, 2.0, 4.5)]


@pytest.mark.parametrize(("gap_s", "num_idle"), [(0.9 * SHORTEST_S, 0), (1.1 * SHORTEST_S, 1)])
def test_the_loops_own_time_is_no_idleness(gap_s: float, num_idle: int) -> None:
    """Gaps that are shorter than a turn of the loop are left out."""
    one, two = drawn("12")
    later = replace(two, start=two.start + gap_s, end=two.end + gap_s)
    assert len(idle_pieces([one, later], [(0, 0)], (0.0, later.end))) == num_idle
