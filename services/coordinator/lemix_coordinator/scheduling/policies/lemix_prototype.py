"""LeMix as the paper's prototype computes it, errors included: a baseline, and a warning.

Three of them matter. The next stage begins from a forward's begin, not from its end, so an idle node is predicted to
answer in one stage's time. All works of a node share one record a stage, so each earlier backward is taken to be where
the latest one is. And the score is a negative number ÷ the response time, so the node that answers *later* scores
higher: whichever node is fed first is fed on.

score(n) = (−max(idle ÷ S − gap, τ) + λ₂ · density(n)) ÷ (λ₁ · response); the highest wins, the first of equals.

Costs are one slope a kind, seconds = η · rows · length², the mean of ratios, as profiled there. Left out of the twin is
what has no place in a function of values: records that predictions on other nodes overwrite, random scores after
exceptions, races, and items that these lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, pi, sqrt
from statistics import fmean
from typing import Final

from lemix_coordinator.scheduling.cluster_state import (
    LAST_ARRIVAL,
    MEAN_LENGTH,
    NUM_LENGTHS,
    SQUARES,
    TRAINING,
    UNFINISHED,
    ClusterState,
)
from lemix_coordinator.scheduling.node_state import NodeState
from lemix_coordinator.scheduling.policies.policy import NeverResizes, PolicyOptions, open_nodes
from lemix_coordinator.scheduling.work import Decision, Work

PROFILED_LENGTHS: Final = (60, 130, 260, 410)
"""Lengths that a profiling run sees; the mean of their ratios is dominated by the short ones."""
SLOPES_WITHOUT_PROFILE: Final = (2e-6, 1e-6)
STAGE_SECONDS_WITHOUT_PROFILE: Final = 0.114
SLOS: Final = 5
RETRY_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Slopes:
    """Seconds a row and squared token, on any stage."""

    forward: float
    backward: float
    slo_s: float
    """S times the mean forward."""


@dataclass(frozen=True, slots=True)
class LemixPrototype(NeverResizes):
    """As coded."""

    name: str
    options: PolicyOptions
    uses_state: bool = True

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """The highest score; training predicted to take beyond 5 SLOs is put off while anybody is served."""
        slopes = slopes_of(state, self.options)
        scored = [
            (*_scored(self.options, state, node, work, slopes, now), node) for node in open_nodes(state)
        ]
        _, response_s, node = max(scored, key=lambda one: one[0])
        is_serving = (state.facts_FN[UNFINISHED] - state.facts_FN[TRAINING]).any()
        if work.is_training and self.options.prioritises and is_serving and response_s > SLOS * slopes.slo_s:
            return Decision(node=None, reason="put off", again_at=now + RETRY_S)
        return Decision(node=node, reason="highest score")


def slopes_of(state: ClusterState, options: PolicyOptions) -> Slopes:
    """As the prototype's profile has them: of the last stage, since it overwrites the others'."""
    num_stages = state.profile.num_stages
    if not options.uses_profile:
        return Slopes(*SLOPES_WITHOUT_PROFILE, STAGE_SECONDS_WITHOUT_PROFILE * num_stages)
    last = state.profile.stages[-1]
    return Slopes(
        fmean([last.forward.of(length, length**2) / length**2 for length in PROFILED_LENGTHS]),
        fmean([last.backward.of(length, length**2) / length**2 for length in PROFILED_LENGTHS]),
        fmean([last.forward.of(length, length**2) for length in PROFILED_LENGTHS]) * num_stages,
    )


def score(options: PolicyOptions, *, profit: float, density: float, response_s: float) -> float:
    """As coded: the higher the better, and since the profit is negative, the later the better."""
    return (profit + options.beta * density) / (options.alpha * response_s)


def _scored(
    options: PolicyOptions, state: ClusterState, node: int, work: Work, slopes: Slopes, now: float
) -> tuple[float, float]:
    """Score and predicted response."""
    facts_F = state.facts_FN[:, node].tolist()
    length, rows = work.padded_length, len(work.lengths)
    response_s, idle_s = _response(state.nodes[node], rows * length**2, slopes, now, facts_F[NUM_LENGTHS] > 0)
    gap_s = now - facts_F[LAST_ARRIVAL] if facts_F[NUM_LENGTHS] else 0.0
    profit = -max(idle_s / state.profile.num_stages - gap_s, options.epsilon)
    density = 0.0
    if facts_F[NUM_LENGTHS] > 1 and facts_F[SQUARES] > 0:
        deviation = sqrt(facts_F[SQUARES] / facts_F[NUM_LENGTHS])
        off = (length - facts_F[MEAN_LENGTH]) / deviation
        density = exp(-0.5 * off * off) / (deviation * sqrt(2 * pi))
    return score(options, profit=profit, density=density, response_s=response_s), response_s


def _response(node: NodeState, size: int, slopes: Slopes, now: float, was_used: bool) -> tuple[float, float]:
    """Until the last forward's end, and the idle time of all stages."""
    forward_s, backward_s = slopes.forward * size, slopes.backward * size
    begin, end, idle_s = now, now, 0.0
    for free, backwards in zip(node.free_S, node.backwards_S, strict=True):
        before = free if was_used else begin
        begin = max(before, begin)  # not the end of the stage before: as coded
        end = begin + forward_s
        within_s = 0.0
        for _ in backwards:
            shared = backwards[-1]
            if end <= shared.begin:
                break
            begin = max(begin, shared.end)
            end = begin + forward_s
            if before <= shared.begin:
                within_s += backward_s
        idle_s += max(begin - before - within_s, 0.0)
    return end - now, idle_s
