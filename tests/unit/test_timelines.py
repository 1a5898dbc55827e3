from __future__ import annotations

from dataclasses import replace

import pytest

from lemix_common.errors import BadInput
from lemix_studies.pieces import Piece
from lemix_studies.recordings import Recording
from lemix_studies.timelines import (
    LONGEST_WINDOW_S,
    chosen_window,
    extent,
    interesting_window,
    item_numbers,
    role_of,
    shares_of,
    window_length,
)
from stage_rows import drawn


def work(start: float, seconds: float = 1.0, *, category: str = "decode", item: str = "r-1") -> Piece:
    """A piece on the only stage."""
    return Piece(node=0, stage=0, category=category, start=start, end=start + seconds, item=item, unit=item)


LONG = [work(second, 0.5) for second in range(200)]


def test_idleness_is_no_work() -> None:
    """A window lies where something was done."""
    pieces = [work(0, 90, category="idle_serving"), work(90), work(95)]
    assert extent(pieces) == (90, 96)


def test_nothing_is_nothing_to_draw() -> None:
    """Nor is idleness alone."""
    with pytest.raises(BadInput, match="nothing to draw"):
        extent([work(0, 9, category="idle_serving")])


@pytest.mark.parametrize(
    ("start", "end", "window"),
    [
        (3.0, 8.0, (3.0, 8.0)),
        (-10.0, -5.0, (189.5, 194.5)),
        (-10.0, None, (189.5, 199.5)),
        (3.0, None, (3.0, 23.0)),
        (None, 30.0, (10.0, 30.0)),
        (100.0, 900.0, (100.0, 900.0)),
    ],
)
def test_a_window_that_is_given(start: float | None, end: float | None, window: tuple[float, float]) -> None:
    """From, to, or both; below 0 from the end of the last work, at 199.5 s."""
    assert chosen_window(LONG, start, end) == window


@pytest.mark.parametrize(("start", "end"), [(8.0, 3.0), (5.0, 5.0), (300.0, None), (None, -500.0)])
def test_a_window_without_work_is_refused(start: float | None, end: float | None) -> None:
    """The message says where there is some."""
    with pytest.raises(BadInput, match=r"work was done from 0 to 199\.5 s"):
        chosen_window(LONG, start, end)


@pytest.mark.parametrize(
    ("seconds", "length_s"), [(0.004, 0.2), (0.006, 0.3), (0.031, 1.0), (0.085, 5.0), (5.0, LONGEST_WINDOW_S)]
)
def test_boxes_are_wide_enough_to_tell_apart(seconds: float, length_s: float) -> None:
    """The longer the pieces, the longer the window: a digit times a power of ten."""
    assert window_length([work(number * 6, seconds) for number in range(100)]) == pytest.approx(length_s)


def test_small_pieces_do_not_shrink_the_window() -> None:
    """What counts is where the time goes, not how many pieces there are."""
    pieces = [work(number, 0.051) for number in range(100)] + [
        work(number + 0.5, 0.0001) for number in range(100)
    ]
    assert window_length(pieces) == pytest.approx(3.0)


def test_a_short_run_is_shown_whole() -> None:
    """Choosing would only hide something."""
    assert chosen_window([work(1, 0.5), work(2, 0.5)], None, None) == (1, 2.5)


def test_the_window_that_is_chosen_has_much_of_everything() -> None:
    """A stretch with some training beats one with more serving; it begins at a round moment."""
    serving = [work(second * 0.5, 0.4) for second in range(200)]
    training = [work(61.3, 0.1, category="training_forward"), work(61.6, 0.1, category="training_backward")]
    start, end = interesting_window(serving + training, 4.0)
    assert start <= 61.3
    assert end >= 61.7
    assert (end - start, start % 1) == (4.0, 0.0)


def test_idleness_is_seen_too_but_does_not_decide() -> None:
    """Among windows full of work the one at whose end a stage waits; not the one in which it only waits."""
    busy = [work(second / 10, 0.1) for second in range(600)]
    waiting = [work(60.0, 40.0, category="idle_serving")]
    assert interesting_window([*busy, *waiting, work(100.0, 0.1)], 4.0) == (56.5, 60.5)


def test_the_first_of_equal_windows_is_chosen() -> None:
    """So equal runs give equal pictures."""
    assert interesting_window([work(second) for second in range(100)], 4.0) == (0.0, 4.0)


def test_numbers_come_from_names_that_are_numbered() -> None:
    """Requests and examples each by theirs, examples with a prime; an optimizer has none."""
    pieces = [
        work(0, item="run-000012"),
        work(1, item="run-000007"),
        work(2, category="training_forward", item="run-000004"),
        work(3, category="optimizer", item="main:1"),
    ]
    assert item_numbers(pieces) == {"run-000012": "12", "run-000007": "7", "run-000004": "4'"}


def test_other_names_are_numbered_in_order() -> None:
    """Of their first pieces: names that end in digits by chance say nothing."""
    pieces = [work(0, item="9f3c12"), work(1, item="77aa"), work(2, item="9f3c12"), work(3, item="0b31")]
    assert item_numbers(pieces) == {"9f3c12": "1", "77aa": "2", "0b31": "3"}


@pytest.mark.parametrize(
    ("row", "role"), [("12", "serves"), ("aA#", "trains"), ("1aA", "serves and trains"), ("..", "idle")]
)
def test_a_node_is_called_by_what_it_does(row: str, role: str) -> None:
    """So one sees which node a policy gave to whom."""
    assert role_of(drawn(row)) == role


def test_shares_are_of_all_stages_in_the_window() -> None:
    """Pieces are cut at its borders; two stages for four seconds are eight."""
    pieces = drawn("11....", ".aaaa.")
    assert shares_of(pieces, (1.0, 5.0), 2) == {"prefill": 1 / 8, "training_forward": 4 / 8}


def test_some_nodes_can_be_picked() -> None:
    """In what was recorded; none means all."""
    pieces = drawn("1", node=0) + drawn("2", node=1)
    recording = Recording(pieces=pieces, positions=[(0, 0), (1, 0)])
    assert recording.of_nodes([1]) == replace(recording, pieces=pieces[1:], positions=[(1, 0)])
    assert recording.of_nodes([]) == recording
    with pytest.raises(BadInput, match=r"no node 2 in what was recorded \(nodes: 0, 1\)"):
        recording.of_nodes([0, 2])
