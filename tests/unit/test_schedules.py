"""Schedules, each as its picture: a stage a line, time to the right, dots for idle time."""

from __future__ import annotations

import pytest

from lemix_common.errors import BadInput
from lemix_common.schedules import (
    SCHEDULES,
    Action,
    Schedule,
    Work,
    a_pp,
    gpipe,
    grid,
    held_by_stage,
    held_by_worker,
    interleaved,
    one_forward_one_backward,
    s_pp,
    schedule_named,
    simulate,
    validate,
    zero_bubble,
)


def drawn(schedule: Schedule, *, width: int = 0) -> str:
    """Its grid, as it can stand in a test."""
    return "\n" + grid(schedule, width=width) + "\n"


def test_s_pp_has_one_microbatch_at_a_time() -> None:
    """Each stage turns from a forward to the same microbatch's backward; the others idle meanwhile."""
    schedule = s_pp(3, 4)
    validate(schedule)
    assert held_by_stage(schedule) == (1, 1, 1)
    assert simulate(schedule).bubble_share == pytest.approx(2 / 3)


def test_gpipe_does_all_forwards_then_all_backwards() -> None:
    """And each stage holds every microbatch's activations."""
    schedule = gpipe(3, 4)
    assert drawn(schedule) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
stage 0  F0 F1 F2 F3 .  .  .  .  .  .  B0--- B1--- B2--- B3---
stage 1  .  F0 F1 F2 F3 .  .  .  B0--- B1--- B2--- B3--- .  .
stage 2  .  .  F0 F1 F2 F3 B0--- B1--- B2--- B3--- .  .  .  .
"""
    )
    assert held_by_stage(schedule) == (4, 4, 4)


def test_1f1b_alternates_once_it_is_ahead() -> None:
    """A stage is ahead by as many forwards as stages follow it, so later stages hold less."""
    schedule = one_forward_one_backward(3, 4)
    assert drawn(schedule) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17
stage 0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
stage 1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
stage 2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .
"""
    )
    assert held_by_stage(schedule) == (3, 2, 1)


def test_1f1b_with_two_microbatches_is_the_papers_synchronous_pipeline() -> None:
    """M = 2: stages that could be further ahead have nothing more to run."""
    assert drawn(one_forward_one_backward(3, 2)) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11
stage 0  F0 F1 .  .  .  .  .  B0--- .  B1---
stage 1  .  F0 F1 .  .  B0--- .  B1--- .  .
stage 2  .  .  F0 B0--- F1 B1--- .  .  .  .
"""
    )


def test_interleaved_passes_every_worker_twice() -> None:
    """Actions name their stage, since a worker has two; both halves of a worker's memory count together."""
    schedule = interleaved(4, 2, workers=2)
    assert drawn(schedule) == (
        """
time        0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
stages 0,2  0F0 0F1 2F0 2F1 .   .   2B0---- .   2B1---- 0B0---- 0B1----
stages 1,3  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1---- .   .
"""
    )
    assert held_by_stage(schedule) == (2, 2, 2, 1)
    assert held_by_worker(schedule) == (4, 3)


def test_zero_bubble_fills_the_end_with_weight_gradients() -> None:
    """Input gradients go on at once; later stages keep more weight gradients back."""
    schedule = zero_bubble(3, 4)
    assert drawn(schedule) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13
stage 0  F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
stage 1  .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
stage 2  .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
"""
    )
    assert held_by_stage(schedule) == (3, 3, 3)


def test_a_pp_goes_on_from_step_to_step() -> None:
    """Three steps of two microbatches: no gap but those of filling and emptying the pipeline once."""
    schedule = a_pp(2, 2, steps=3)
    assert drawn(schedule) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20
stage 0  F0 F1 .  .  B0--- F2 B1--- F3 B2--- F4 B3--- F5 B4--- .  B5---
stage 1  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- F4 B4--- F5 B5--- .  .
"""
    )
    assert [schedule.version_of(step) for step in range(3)] == [0, 0, 1]


def test_a_synchronous_step_waits_for_the_one_before() -> None:
    """Its microbatches are counted on, and every stage begins when all gradients of the step before are there."""
    assert drawn(zero_bubble(2, 2, steps=2)) == (
        """
time     0  1  2  3  4  5  6  7  8  9  10 11 12 13
stage 0  F0 F1 .  I0 W0 I1 W1 F2 F3 .  I2 W2 I3 W3
stage 1  .  F0 I0 F1 I1 W0 W1 .  F2 I2 F3 I3 W2 W3
"""
    )


def test_a_wide_picture_is_cut_into_bands() -> None:
    """An action at the border goes on in the next band."""
    assert drawn(gpipe(2, 2), width=30) == (
        """
time     0  1  2  3  4  5  6
stage 0  F0 F1 .  .  .  B0---
stage 1  .  F0 F1 B0--- B1---

time     7  8
stage 0  B1---
stage 1  .  .
"""
    )
    assert drawn(gpipe(2, 2), width=26) == (
        """
time     0  1  2  3  4
stage 0  F0 F1 .  .  .
stage 1  .  F0 F1 B0---

time     5  6  7  8
stage 0  B0--- B1---
stage 1  B1--- .  .
"""
    )


def test_an_action_is_written_as_torch_does() -> None:
    """Stage, letter, microbatch."""
    assert [str(Action(2, work, 10)) for work in Work] == ["2F10", "2B10", "2I10", "2W10"]


def test_costs_and_delays_move_everything_after_them() -> None:
    """A slow last stage, a slow link and a slow commit are waited for by exactly those who need them."""
    timing = simulate(
        gpipe(2, 1, steps=2), lambda action: 3.0 if action.stage == 1 else 1.0, send=0.5, commit=2.0
    )
    assert [[(str(span.action), span.start, span.end) for span in spans] for spans in timing.spans] == [
        [("0F0", 0, 1), ("0B0", 8, 9), ("0F1", 11, 12), ("0B1", 19, 20)],
        [("1F0", 1.5, 4.5), ("1B0", 4.5, 7.5), ("1F1", 12.5, 15.5), ("1B1", 15.5, 18.5)],
    ]
    assert list(timing.versions) == [0, 11, 22]
    assert timing.makespan == 20
    assert list(timing.busy) == [4, 12]
    assert list(timing.bubble_shares) == pytest.approx([0.8, 0.4])
    assert timing.bubble_share == pytest.approx(0.6)


def test_every_schedule_is_found_by_its_name() -> None:
    """With one worker a stage, but one for two stages where they are interleaved."""
    found = [schedule_named(name, stages=4, microbatches=4) for name in SCHEDULES]
    assert [schedule.name for schedule in found] == [
        *("s-pp", "gpipe", "1f1b", "interleaved", "zero-bubble", "a-pp")
    ]
    assert [len(schedule.orders) for schedule in found] == [4, 4, 4, 2, 4, 4]


@pytest.mark.parametrize(
    ("name", "numbers", "reason"),
    [
        ("a-pp", {"stages": 3, "microbatches": 2}, "2 on 3 stages can't be"),
        ("gpipe", {"stages": 0, "microbatches": 2}, "0 stages: there must be at least 1"),
        ("1f1b", {"stages": 2, "microbatches": 0}, "0 microbatches: there must be at least 1"),
        ("zero-bubble", {"stages": 2, "microbatches": 2, "steps": 0}, "0 steps"),
        ("gpipe", {"stages": 4, "microbatches": 2, "workers": 2}, "4 stages take 4 workers, not 2"),
        ("interleaved", {"stages": 4, "microbatches": 2, "workers": 4}, "4 stages on 4 workers can't be"),
        ("interleaved", {"stages": 4, "microbatches": 2, "workers": 3}, "4 stages on 3 workers can't be"),
        ("interleaved", {"stages": 4, "microbatches": 2, "workers": 0}, "0 workers"),
        ("interleaved", {"stages": 3, "microbatches": 2}, "3 can't be, say how many workers"),
        ("2f2b", {"stages": 3, "microbatches": 2}, "no schedule '2f2b': use s-pp, gpipe, 1f1b, interleaved"),
    ],
)
def test_what_cannot_be_is_refused(name: str, numbers: dict[str, int], reason: str) -> None:
    """In one sentence with the numbers."""
    with pytest.raises(BadInput, match=reason):
        schedule_named(name, **{"steps": 1, "workers": None} | numbers)  # type: ignore[arg-type]
