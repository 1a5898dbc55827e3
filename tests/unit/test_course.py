"""The order of a stage's work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.schedules import SCHEDULES, Work
from lemix_stage_worker.course import Piece, follow, pieces_of


def course(
    schedule: str, stage: int, microbatches: list[int], *, stages: int = 4, step: int = 1
) -> list[Piece]:
    """One stage's pieces of a step; a node with interleaved stages has half as many workers."""
    workers = 2 if schedule == "interleaved" else stages
    return pieces_of(
        schedule, stage=stage, stages=stages, workers=workers, step=step, microbatches=microbatches
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stage", range(4))
def test_every_microbatch_of_the_node_goes_forward_and_back_once(schedule: str, stage: int) -> None:
    """Those of the step that are this node's, and gradients in the order of microbatches."""
    mine = [1, 4, 5, 7, 8]
    pieces = course(schedule, stage, mine)
    assert [piece.microbatch for piece in pieces if piece.work is Work.FORWARD] == mine
    last = Work.WEIGHT_GRADIENT if schedule == "zero-bubble" else Work.BACKWARD
    assert [piece.microbatch for piece in pieces if piece.work is last] == mine


def test_a_node_without_microbatches_has_nothing_to_do() -> None:
    """The other nodes have the step's shards."""
    assert course("1f1b", 0, []) == []


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 12))
def test_two_overlapping_steps_are_one_long_one(first: int, second: int, stage: int, done: int) -> None:
    """However far a stage has come with a step when the next one arrives, it goes on as if it had known both."""
    before = course("a-pp", stage, list(range(first)))
    after = course("a-pp", stage, list(range(second)), step=2)
    both = [(piece.work, piece.microbatch) for piece in course("a-pp", stage, list(range(first + second)))]
    held = max_held = 4 - stage
    gone = before[: min(done, len(before))]
    held = sum(1 if piece.work is Work.FORWARD else -1 for piece in gone)
    merged = follow(before[len(gone) :], after, held=held, most_held=max_held)
    found = [(p.work, p.microbatch + (first if p.step == 2 else 0)) for p in (*gone, *merged)]
    assert sorted(found) == sorted(both)
    for work in (Work.FORWARD, Work.BACKWARD):
        assert [p for p in found if p[0] is work] == [p for p in both if p[0] is work]
    level = 0
    for work, _ in found:
        level += 1 if work is Work.FORWARD else -1
        assert 0 <= level <= max_held
    if all(piece.work is Work.FORWARD for piece in gone):  # it hasn't begun to drain
        assert found == both
