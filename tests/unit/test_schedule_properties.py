"""What holds of the schedules whatever the numbers: 1 to 6 stages, 1 to 12 microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix_common.errors import BadInput
from lemix_common.schedules import (
    Action,
    Schedule,
    Work,
    a_pp,
    gpipe,
    held_by_stage,
    held_by_worker,
    interleaved,
    one_forward_one_backward,
    s_pp,
    simulate,
    validate,
    zero_bubble,
)

STAGES = range(1, 7)
MICROBATCHES = range(1, 13)
ONE_STAGE_A_WORKER = (s_pp, gpipe, one_forward_one_backward, zero_bubble)
SIZES = list(product(STAGES, MICROBATCHES))
ALLOWED_OF_A_PP = [(stages, microbatches) for stages, microbatches in SIZES if microbatches >= stages]


def all_schedules(*, steps: int = 1) -> Iterator[Schedule]:
    """Of every kind and every size that is allowed."""
    for stages, microbatches in SIZES:
        for make in ONE_STAGE_A_WORKER:
            yield make(stages, microbatches, steps=steps)
        for workers in range(1, stages // 2 + 1):
            if stages % workers == 0:
                yield interleaved(stages, microbatches, workers=workers, steps=steps)
        if microbatches >= stages:
            yield a_pp(stages, microbatches, steps=steps)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_schedule_is_valid(steps: int) -> None:
    """Complete, without a deadlock, in one step and in several that follow each other."""
    for schedule in all_schedules(steps=steps):
        validate(schedule)


def test_a_stage_takes_microbatches_in_order() -> None:
    """Each kind of its work goes up by one: gradients are summed in one order, so sums are equal to the bit."""
    for schedule in all_schedules(steps=2):
        for stage, work in product(range(schedule.stages), Work):
            taken = [
                action.microbatch
                for action in schedule.actions()
                if action.stage == stage and action.work is work
            ]
            assert taken in ([], list(range(2 * schedule.microbatches)))


def test_1f1b_holds_as_many_activations_as_stages_are_left() -> None:
    """At most ``stages - stage``, however many microbatches there are; GPipe holds them all."""
    for stages, microbatches in SIZES:
        held = tuple(min(stages - stage, microbatches) for stage in range(stages))
        assert held_by_stage(one_forward_one_backward(stages, microbatches)) == held
        assert held_by_stage(gpipe(stages, microbatches)) == (microbatches,) * stages


def test_zero_bubble_holds_what_the_first_stage_of_1f1b_does() -> None:
    """On every stage, weight gradients that are kept back included."""
    for stages, microbatches in SIZES:
        held = (min(stages, microbatches),) * stages
        assert held_by_stage(zero_bubble(stages, microbatches)) == held


def test_a_worker_of_one_stage_holds_what_the_stage_does() -> None:
    """And one of several no more than they do together."""
    for schedule in all_schedules():
        by_stage, by_worker = held_by_stage(schedule), held_by_worker(schedule)
        together = tuple(sum(by_stage[stage] for stage in stages) for stages in schedule.hosted())
        assert all(one <= other for one, other in zip(by_worker, together, strict=True))
        assert schedule.name == "interleaved" or by_worker == together


def test_zero_bubble_is_never_idle_for_longer_than_1f1b() -> None:
    """With a backward as long as its two halves."""
    for stages, microbatches in SIZES:
        split = simulate(zero_bubble(stages, microbatches))
        whole = simulate(one_forward_one_backward(stages, microbatches))
        assert split.bubble_share <= whole.bubble_share + 1e-9


def test_bubbles_are_what_docs_training_says() -> None:
    """GPipe and 1F1B: (S-1)/(M+S-1), zero-bubble: (S-1)/(3M+S-1), interleaved: (P-1)/(VM+P-1)."""
    for stages, microbatches in SIZES:
        ends = stages - 1
        for make in (gpipe, one_forward_one_backward):
            assert simulate(make(stages, microbatches)).bubble_share == pytest.approx(
                ends / (microbatches + ends)
            )
        if microbatches >= stages:
            split = simulate(zero_bubble(stages, microbatches))
            assert split.bubble_share == pytest.approx(ends / (3 * microbatches + ends))
    for workers, each, rounds in product(range(1, 5), range(2, 4), range(1, 4)):
        schedule = interleaved(workers * each, rounds * workers, workers=workers)
        wanted = (workers - 1) / (each * rounds * workers + workers - 1)
        assert simulate(schedule).bubble_share == pytest.approx(wanted)


def test_interleaved_holds_what_docs_training_says() -> None:
    """Worker p: (V+1)P - 1 - 2p microbatches of one of its stages, from two rounds on."""
    for workers, each, rounds in product(range(1, 5), range(2, 4), range(2, 4)):
        schedule = interleaved(workers * each, rounds * workers, workers=workers)
        held = tuple((each + 1) * workers - 1 - 2 * worker for worker in range(workers))
        assert held_by_worker(schedule) == held


def test_interleaved_is_never_idle_for_longer_than_1f1b_on_as_many_workers() -> None:
    """Also where microbatches don't divide into equal rounds."""
    for workers, each, microbatches in product(range(1, 5), range(2, 4), MICROBATCHES):
        thin = simulate(interleaved(workers * each, microbatches, workers=workers))
        thick = simulate(one_forward_one_backward(workers, microbatches))
        assert thin.bubble_share <= thick.bubble_share + 1e-9


# ---- a-pp
def costs_of(stages: int) -> st.SearchStrategy[Callable[[Action], float]]:
    """What forwards and backwards take, another time on each stage."""
    each = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=stages, max_size=stages)

    def cost(durations: list[tuple[int, int]]) -> Callable[[Action], float]:
        return lambda action: float(durations[action.stage][action.work is Work.BACKWARD])

    return each.map(cost)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(ALLOWED_OF_A_PP), st.data(), st.integers(0, 20), st.integers(0, 3))
def test_a_pp_is_exactly_one_version_late(
    size: tuple[int, int], choose: st.DataObject, commit: int, send: int
) -> None:
    """A step takes version n to make n + 2, never sooner than n is there, whatever work, links and commits take.

    So two versions are enough: the one a step takes is given up before the one after next is written.
    """
    schedule = a_pp(*size, steps=4)
    timing = simulate(schedule, choose.draw(costs_of(schedule.stages)), commit=commit, send=send)
    assert [schedule.version_of(step) for step in range(4)] == [0, 0, 1, 2]
    for span in (span for spans in timing.spans for span in spans):
        step = schedule.step_of(span.action)
        assert span.start >= timing.versions[schedule.version_of(step)]
        assert span.end <= timing.versions[step + 1] - commit
    assert list(timing.versions) == sorted(timing.versions)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (3, 3), (4, 8), (6, 7)])
def test_a_pp_has_no_flush(stages: int, microbatches: int) -> None:
    """Between its first and its last action every stage is idle only while the pipeline fills and empties, once.

    A synchronous schedule pays that in each step.
    """
    for steps in (1, 2, 5):
        once = 3 * (stages - 1)
        assert simulate(a_pp(stages, microbatches, steps=steps)).makespan == 3 * microbatches * steps + once
        each = one_forward_one_backward(stages, microbatches, steps=steps)
        assert simulate(each).makespan == (3 * microbatches + once) * steps


def test_a_pp_hides_a_commit() -> None:
    """With as many microbatches as stages, a commit as long as a forward and a backward costs no time."""
    for stages in STAGES:
        schedule = a_pp(stages, stages, steps=4)
        assert simulate(schedule, commit=3).makespan == simulate(schedule).makespan
        assert simulate(schedule, commit=4).makespan > simulate(schedule).makespan


def test_with_fewer_microbatches_than_stages_a_pp_would_wait() -> None:
    """One fewer and every commit costs time; two fewer and the next step but one waits for itself."""

    def a_pp_anyway(stages: int, microbatches: int) -> Schedule:
        return replace(
            one_forward_one_backward(stages, microbatches * 4),
            name="a-pp",
            delay=1,
            steps=4,
            microbatches=microbatches,
        )

    one_fewer = a_pp_anyway(4, 3)
    assert simulate(one_fewer, commit=1).makespan > simulate(one_fewer).makespan
    with pytest.raises(BadInput, match="a-pp can't go on: 0F4 for version 1"):
        validate(a_pp_anyway(4, 2))
    assert a_pp(4, 4, steps=4).orders == a_pp_anyway(4, 4).orders


def test_times_follow_the_orders() -> None:
    """A worker does one thing after the other, and nothing before what it needs."""
    for schedule in (make(4, 6, steps=2) for make in (*ONE_STAGE_A_WORKER, a_pp)):
        timing = simulate(schedule, send=0.25)
        ends = {part: span.end for spans in timing.spans for span in spans for part in span.action.parts()}
        for spans in timing.spans:
            assert all(one.end <= other.start for one, other in pairwise(spans))
            for span in spans:
                needed = span.action.needs(schedule.stages)
                assert all(
                    ends[need] + 0.25 * (need.stage != span.action.stage) <= span.start for need in needed
                )
