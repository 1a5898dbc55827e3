"""Points on the simulator, with profiles from a roofline or from files of measured ones.

A policy that is kept to some nodes runs in a cluster of no others: the rest hold no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lemix_common.costs import Profile
from lemix_common.profile_file import read_profile
from lemix_coordinator.expectations import SLO_FACTOR
from lemix_coordinator.scheduling.policies import Policy, PolicyOptions, make_policy
from lemix_studies.accelerators import profile_of
from lemix_studies.experiments.bounds import lower_bounds
from lemix_studies.experiments.close_ups import close_up_of
from lemix_studies.experiments.runners import CloseUp
from lemix_studies.experiments.settings import Point, Setting, Variant
from lemix_studies.experiments.workloads import Sources, Workload, workload_of
from lemix_studies.simulator import Outcome, Scenario, measures, simulate, slo_base_s


class SimulatorRunner:
    """Runs points in numbers."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._last: tuple[Setting, Workload, Mapping[str, float]] | None = None

    def run(self, point: Point) -> Mapping[str, Any]:
        """See `Runner`."""
        workload, bounds = self._workload(point.setting)
        outcome = self._simulate(point, keep_intervals=False)
        profile = profile_for(point.setting)
        base_s = slo_base_s(profile, workload.requests)
        busy_s = bounds["busy_s"]
        held_s = outcome.node_seconds * profile.num_stages
        used = {record.node for record in outcome.records}
        return {
            **measures(outcome, base_s),
            "capped": workload.capped,
            "unselected": workload.unselected,
            "nodes_used": len(used),
            "nodes_held_mean": outcome.node_seconds / outcome.duration_s if outcome.duration_s else 0.0,
            "busy_share": busy_s / held_s if held_s else 0.0,
            "makespan_bound_s": bounds["makespan_s"],
            "node_seconds_bound": bounds["node_seconds"],
        }

    def close_up(self, point: Point) -> CloseUp | None:
        """See `Runner`."""
        outcome = self._simulate(point, keep_intervals=True)
        return close_up_of(outcome, point, num_stages=point.setting.stages)

    def saturation(self, setting: Setting) -> float | None:
        """See `Runner`: nodes ÷ the slowest stage's mean time for a request."""
        profile = profile_for(setting)
        requests = workload_of(setting, self._sources).requests
        slowest_s = max(
            sum(stage.forward.of(work.tokens, work.contexts) for work in requests) for stage in profile.stages
        )
        return setting.nodes * len(requests) / slowest_s

    def _workload(self, setting: Setting) -> tuple[Workload, Mapping[str, float]]:
        """Kept for the policies of one setting, which follow each other."""
        if self._last is None or self._last[0] != setting:
            workload = workload_of(setting, self._sources)
            self._last = setting, workload, lower_bounds(profile_for(setting), workload, setting)
        return self._last[1], self._last[2]

    def _simulate(self, point: Point, *, keep_intervals: bool) -> Outcome:
        setting, variant = point.setting, point.variant
        workload, _ = self._workload(setting)
        profile = profile_for(setting)
        base_s = slo_base_s(profile, workload.requests)
        return simulate(
            Scenario(
                profile=profile,
                nodes=variant.use_nodes or setting.nodes,
                policy=policy_of(setting, variant, slo_s=SLO_FACTOR * base_s),
                requests=workload.requests,
                training=workload.training,
                release=setting.release,
                microbatches=setting.microbatches,
                schedule=setting.schedule,
                order=setting.stage_order,
                decode_batch=setting.decode_batch,
                checks_memory=variant.checks_memory,
                slo_s=SLO_FACTOR * base_s,
                keep_intervals=keep_intervals,
                seed=setting.seed,
            )
        )


def policy_of(setting: Setting, variant: Variant, *, slo_s: float) -> Policy:
    """The policy of a variant, with its options."""
    given: dict[str, Any] = {
        name: value
        for name in ("alpha", "beta", "epsilon", "use_nodes")
        if (value := getattr(variant, name)) is not None
    }
    if variant.prefer:
        given["prefer"] = variant.prefer
    options = PolicyOptions(
        seed=setting.seed,
        training_rate=setting.training_rate if variant.split is None else variant.split,
        slo_s=slo_s,
        uses_profile=variant.uses_profile,
        prioritises=variant.prioritises,
        checks_memory=variant.checks_memory,
        **given,
    )
    return make_policy(variant.policy, options)


@lru_cache(maxsize=64)
def _profile(model: str, device: str, stages: int) -> Profile:
    return read_profile(Path(device)) if device.endswith(".json") else profile_of(model, device, stages)


def profile_for(setting: Setting) -> Profile:
    """A roofline's, or that of a file if the device is one."""
    return _profile(setting.model, setting.device, setting.stages)
