from __future__ import annotations

import pytest

from lemix import Generation, Score
from lemix_studies.curves import binned, exact_matches, latency_curves, loss_curves, running_mean, started_at
from lemix_studies.measures import IdleTimes, ItemTimes
from lemix_studies.replay import CommittedStep, Outcome
from lemix_studies.workload import Kind, PlannedArrival

ITEMS = [
    ItemTimes(item="t-0", kind="train", submitted=100.0, ends=["done"], ended=104.0, weights_version="0.1"),
    ItemTimes(
        item="g-1", kind="generate", submitted=101.0, ends=["done"], ended=103.5, weights_version="0.0",
        token_times=[102.0, 102.5, 103.5],
    ),
    ItemTimes(item="s-2", kind="score", submitted=102.0, ends=["done"], ended=105.0, weights_version="0.1"),
    ItemTimes(item="t-3", kind="train", submitted=103.0),
    ItemTimes(item="s-4", kind="score", submitted=104.0, ends=["failed"], ended=104.5),
]  # fmt: skip


def arrival(line: int, kind: Kind) -> PlannedArrival:
    """One whose text goes on with 7, 8, 9."""
    return PlannedArrival(line=line, at_s=0.0, kind=kind, prompt=(1,), reference=(7, 8, 9), is_capped=False)


def step(number: int, *items: str, loss: float | None = 2.0) -> CommittedStep:
    """A committed step."""
    return CommittedStep(run_id="main", step=number, items=items, weights_version=f"0.{number}", loss=loss)


def outcome(*steps: CommittedStep, tokens: tuple[int, ...] = (7, 8, 9)) -> Outcome:
    """A run whose clock begins at 100."""
    return Outcome(
        arrivals={"g-1": arrival(1, "generate"), "s-2": arrival(2, "score")},
        items=ITEMS,
        answers={"s-2": Score(1.5, (), "0.1"), "g-1": Generation("", tokens, "length", "0.0", ((0, "0.0"),))},
        steps=list(steps),
        spans=[],
        idle=IdleTimes(slo_base_s=0.5, ttft_s=0.25, itl_s=0.125),
        nodes=1,
        dead_lettered=0,
        max_lateness_s=0.0,
        weights_sha256={},
    )


def test_the_clock_begins_with_the_first_submission() -> None:
    """Of any kind of item; without one, it doesn't matter."""
    assert started_at(ITEMS) == 100.0
    assert started_at([]) == 0.0


def test_a_step_is_when_its_examples_were_done() -> None:
    """Steps whose loss or end nobody saw are left out."""
    curves = loss_curves(outcome(step(1, "t-0"), step(2, "t-3"), step(3, "t-0", loss=None), step(4)))
    assert curves.steps == [(4.0, 2.0)]


def test_answers_are_scored_and_compared_when_they_end() -> None:
    """And a version is there from its first answer on."""
    curves = loss_curves(outcome())
    assert (curves.scores, curves.matches) == ([(5.0, 1.5)], [(3.5, 1.0)])
    assert curves.versions == [(3.5, "0.0"), (5.0, "0.1")]


def test_a_generation_matches_token_by_token() -> None:
    """One token more, less or other is no match."""
    assert exact_matches(outcome(tokens=(7, 8))) == {"g-1": 0.0}


def test_each_latency_has_its_moment_and_its_idle_value() -> None:
    """First tokens and responses at their submission, gaps when they end; only the answered ones."""
    assert [(curve.name, curve.points, curve.idle_s) for curve in latency_curves(outcome())] == [
        ("time to first token", [(1.0, 1.0)], 0.25),
        ("between tokens", [(2.5, 0.5), (3.5, 1.0)], 0.125),
        ("response", [(1.0, 2.5), (2.0, 3.0)], 0.0),
    ]


def test_a_running_mean_is_of_the_last_points() -> None:
    """Of fewer at the beginning."""
    assert running_mean([(0, 2.0), (1, 4.0), (2, 9.0)], 2) == [(0, 2.0), (1, 3.0), (2, 6.5)]


def test_percentiles_over_time_need_points() -> None:
    """A dozen in the mean a bin; a bin with fewer than three has none, nor has a run of few requests."""
    assert binned([(float(t), 1.0) for t in range(20)]) == []
    bins = binned([(t / 40, 1.0) for t in range(38)] + [(2.0, 9.0)])
    assert [one.t for one in bins] == pytest.approx([1 / 3, 1.0])
    assert [(one.p50, one.p95) for one in bins] == [(1.0, 1.0), (1.0, 1.0)]
