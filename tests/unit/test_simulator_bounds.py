from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from lemix_common.costs import Cost
from lemix_studies.simulator import Scenario, simulate
from lemix_studies.simulator.bounds import Dealt, makespan_bound_s, oracle
from lemix_studies.simulator.scenario import MicrobatchSchedule, Release
from simulated_loads import ByTurns, line_profile, poisson_load, work_of


@pytest.mark.parametrize("release", ["s-pp", "a-pp"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("kind", ["score", "generate"])
def test_nothing_ends_before_the_bound(release: Release, microbatches: int, kind: str) -> None:
    """Under any rule."""
    for seed in range(3):
        requests, training = poisson_load(
            60, 100, seed=seed, kind="generate" if kind == "generate" else "score", new=4
        )
        scenario = Scenario(
            profile=line_profile(),
            nodes=2,
            policy=ByTurns(),
            requests=requests,
            training=training,
            release=release,
            microbatches=microbatches,
        )
        assert makespan_bound_s(scenario) <= simulate(scenario).duration_s + 1e-9


def test_the_bound_is_reached_where_nothing_can_wait() -> None:
    """One node of one stage that always has something to do, and a chain of training."""
    requests = [work_of(number) for number in range(10)]
    scenario = Scenario(profile=line_profile(1), nodes=1, policy=ByTurns(), requests=requests)
    assert makespan_bound_s(scenario) == pytest.approx(simulate(scenario).duration_s)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_training_alone_takes_what_its_schedule_takes(
    schedule: MicrobatchSchedule, microbatches: int
) -> None:
    """A chain of steps, each timed by the schedule's own rules, on whichever nodes."""
    training = [work_of(number, kind="train", lengths=(50, 80, 100)) for number in range(4)]
    chain = Scenario(
        profile=line_profile(3, hop=Cost(base=1e-3)),
        nodes=2,
        policy=ByTurns(),
        training=training,
        schedule=schedule,
        microbatches=microbatches,
    )
    assert makespan_bound_s(chain) == pytest.approx(simulate(chain).duration_s)


def test_the_oracle_is_the_best_placement() -> None:
    """Of few items: no other one of all placements ends earlier."""
    requests, training = poisson_load(6, 200, seed=4)
    scenario = Scenario(
        profile=line_profile(),
        nodes=2,
        policy=ByTurns(),
        requests=requests,
        training=training,
        release="a-pp",
    )
    best, nodes = oracle(scenario)
    works = (*requests, *training)
    every = [
        simulate(
            replace(scenario, policy=Dealt(dict(zip((w.item for w in works), choice, strict=True))))
        ).duration_s
        for choice in product(range(2), repeat=len(works))
    ]
    assert best.duration_s == min(every)
    assert len(nodes) == len(works)
    assert makespan_bound_s(scenario) <= best.duration_s <= simulate(scenario).duration_s


def test_a_beam_is_no_worse_than_turns() -> None:
    """Of more items than can be tried one by one."""
    requests, training = poisson_load(20, 200, seed=1)
    scenario = Scenario(
        profile=line_profile(),
        nodes=3,
        policy=ByTurns(),
        requests=requests,
        training=training,
        release="a-pp",
    )
    assert oracle(scenario, beam=8)[0].duration_s <= simulate(scenario).duration_s
