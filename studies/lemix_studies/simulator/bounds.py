"""How good a policy could be at best: a bound that no placement beats, and for few items the best placement itself.

The busy-time bound: whatever arrives from some moment on still takes its time of each stage position, of which there is
one a node; and every item takes its own way after it has arrived; and steps that are released one behind the other's
end come one behind the other's end.

The oracle knows all arrivals. It tries placements with the simulator itself: every one of few items (nodes are alike,
so each item may open only the next unused one), else the most promising beginnings (beam search, by what comes of those
alone that were placed so far).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from typing import Final

from lemix_common.costs import Profile
from lemix_common.errors import BadInput
from lemix_common.schedules import Action, schedule_named
from lemix_common.schedules import Work as Pass
from lemix_common.schedules import simulate as time_of
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.work import Decision, Resize, Work
from lemix_studies.simulator.engine import simulate
from lemix_studies.simulator.jobs import microbatches_of
from lemix_studies.simulator.scenario import Outcome, Scenario

Objective = Callable[[Outcome], float]

MOST_PLACEMENTS: Final = 20_000
"""That are tried one by one; with more there is a beam."""


def makespan_bound_s(scenario: Scenario) -> float:
    """From the first arrival to the last end, at least, on all of the scenario's nodes."""
    profile = scenario.profile
    works = sorted((*scenario.requests, *scenario.training), key=lambda work: work.arrived_at)
    if not works:
        return 0.0
    start = works[0].arrived_at
    at_least = max(work.arrived_at + _alone_s(work, scenario) for work in works)
    for stage in range(profile.num_stages):
        left_s = 0.0
        for work in reversed(works):
            left_s += busy_s(
                work,
                stage,
                profile,
                decode_batch=scenario.decode_batch,
                microbatches=scenario.microbatches,
            )
            at_least = max(at_least, work.arrived_at + left_s / scenario.nodes)
    if scenario.release == "s-pp":
        ended = 0.0
        for work in scenario.training:
            ended = max(ended, work.arrived_at) + _alone_s(work, scenario)
        at_least = max(at_least, ended)
    return at_least - start


def oracle(
    scenario: Scenario,
    objective: Objective = lambda outcome: outcome.duration_s,
    *,
    beam: int = 32,
) -> tuple[Outcome, tuple[int, ...]]:
    """The outcome with the least objective, and the node of each item in order of arrival, training behind requests."""
    works = sorted((*scenario.requests, *scenario.training), key=lambda work: work.arrived_at)
    if not works:
        raise BadInput("an oracle needs something to place")
    is_exhaustive = scenario.nodes ** max(len(works) - 1, 0) <= MOST_PLACEMENTS
    beginnings: list[tuple[int, ...]] = [()]
    for number in range(1, len(works) + 1):
        longer = [
            (*nodes, node)
            for nodes in beginnings
            for node in range(min(max(nodes, default=-1) + 2, scenario.nodes))
        ]
        if is_exhaustive or len(longer) <= beam:
            beginnings = longer
            continue
        part = _only(scenario, works[:number])
        beginnings = nsmallest(beam, longer, key=lambda nodes: _score(part, works, nodes, objective))
    best = min(beginnings, key=lambda nodes: _score(scenario, works, nodes, objective))
    placed = dict(zip((work.item for work in works), best, strict=True))
    outcome = simulate(replace(scenario, policy=Dealt(placed)))
    order = (*scenario.requests, *scenario.training)
    return outcome, tuple(placed[work.item] for work in order)


def busy_s(
    work: Work, stage: int, profile: Profile, *, decode_batch: int = 1, microbatches: int = 1
) -> float:
    """Of a stage's time, at least: iterations are full."""
    costs = profile.stages[stage]
    if not work.is_training:
        return _request_s(work, stage, profile, rows=max(decode_batch, len(work.lengths)))
    parts = microbatches_of(work.lengths, microbatches)
    forward = costs.forward_of(is_training=True)
    return sum(forward.of(*part) + costs.backward.of(*part) for part in parts) + costs.optimizer_s


@dataclass(frozen=True, slots=True)
class Dealt:
    """The policy that was told where everything goes."""

    node_of: Mapping[str, int]
    name: str = "oracle"
    uses_state: bool = False

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """As it was told."""
        del state, now
        return Decision(node=self.node_of[work.item], reason="known before")

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """All nodes stay."""
        del state, waiting, now
        return Resize()


def _score(
    scenario: Scenario, works: Sequence[Work], nodes: Sequence[int], objective: Objective
) -> tuple[float, float]:
    """The objective; of equal ones the mean response decides."""
    placed = dict(zip((work.item for work in works), nodes, strict=False))
    outcome = simulate(replace(scenario, policy=Dealt(placed)))
    return objective(outcome), sum(record.response_s for record in outcome.records)


def _only(scenario: Scenario, works: Sequence[Work]) -> Scenario:
    names = {work.item for work in works}
    return replace(
        scenario,
        requests=[work for work in scenario.requests if work.item in names],
        training=[work for work in scenario.training if work.item in names],
    )


def _alone_s(work: Work, scenario: Scenario) -> float:
    """From an item's begin to its end on a node that has nothing else."""
    profile = scenario.profile
    hop = profile.hop
    if not work.is_training:
        seconds = sum(
            _request_s(work, stage, profile, rows=len(work.lengths)) for stage in range(profile.num_stages)
        )
        return seconds + hop.of(work.tokens) * (profile.num_stages - 1)
    parts = microbatches_of(work.lengths, scenario.microbatches)
    schedule = schedule_named(scenario.schedule, stages=profile.num_stages, microbatches=len(parts))

    def seconds_of(action: Action) -> float:
        costs = profile.stages[action.stage]
        line = costs.forward_of(is_training=True) if action.work is Pass.FORWARD else costs.backward
        return line.of(*parts[action.microbatch])

    hop_s = min(hop.of(*part) for part in parts)
    return time_of(schedule, seconds_of, send=hop_s).makespan + max(s.optimizer_s for s in profile.stages)


def _request_s(work: Work, stage: int, profile: Profile, *, rows: int) -> float:
    """Of a request on a stage, whose iterations' fixed part is shared by so many rows, none of them rounded up."""
    costs = profile.stages[stage]
    own = len(work.lengths)
    first = costs.forward.of(work.tokens, work.contexts)
    if work.kind != "generate":
        return first
    first -= costs.forward.base * (1 - own / rows)
    following = work.new_tokens - 1
    contexts = work.tokens + own * (following + 1) / 2
    return first + following * (
        costs.decode.base * own / rows + costs.decode.token * own + costs.decode.context * contexts
    )
