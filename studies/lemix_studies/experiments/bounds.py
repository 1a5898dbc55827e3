"""What no policy can undercut, from what the items cost alone."""

from __future__ import annotations

from collections.abc import Mapping

from lemix_common.costs import Profile
from lemix_coordinator.scheduling.work import Work
from lemix_studies.experiments.settings import Setting
from lemix_studies.experiments.workloads import Workload


def lower_bounds(profile: Profile, workload: Workload, setting: Setting) -> Mapping[str, float]:
    """Busy seconds of all stages; the makespan and the node-seconds that they make unavoidable.

    A node holds weights at least as long as its busiest stage computes. A run lasts at least as long as that takes on
    all nodes, until the last request has come and been served, and under S-PP as long as one training step after
    the other: each at least what its slowest stage computes.
    """
    busy_s_of = [0.0] * profile.num_stages
    for work in workload.requests:
        for stage, seconds in enumerate(_request_s(profile, work)):
            busy_s_of[stage] += seconds
    chain_s = 0.0
    for work in workload.training:
        own_s_of = _training_s(profile, work, setting.microbatches)
        for stage, seconds in enumerate(own_s_of):
            busy_s_of[stage] += seconds
        chain_s += max(own_s_of) if setting.release == "s-pp" else 0.0
    last_s = max(
        (work.arrived_at + sum(_request_s(profile, work)) for work in workload.requests), default=0.0
    )
    busiest_s = max(busy_s_of, default=0.0)
    return {
        "busy_s": sum(busy_s_of),
        "node_seconds": busiest_s,
        "makespan_s": max(last_s, chain_s, busiest_s / setting.nodes),
    }


def _request_s(profile: Profile, work: Work) -> list[float]:
    """By stage; of a generation the prompt alone, since its iterations are shared."""
    return [stage.forward.of(work.tokens, work.contexts) for stage in profile.stages]


def _training_s(profile: Profile, work: Work, microbatches: int) -> list[float]:
    """By stage: each microbatch has the fixed part of both passes."""
    number = min(microbatches, len(work.lengths))
    lines = [(stage.forward_of(is_training=True), stage.backward) for stage in profile.stages]
    return [
        sum(line.of(work.tokens, work.contexts) + (number - 1) * line.base for line in pair)
        + stage.optimizer_s
        for pair, stage in zip(lines, profile.stages, strict=True)
    ]
