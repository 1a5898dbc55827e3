"""The simulated twin of an emulated cluster: the same items at the same moments, on the same slowed accelerators.

It keeps to the workers' rules (`Scenario.is_as_workers`), deals as a leading coordinator does (requests are numbered in
the order in which they come, those that measured the idle cluster first), and computes as many tokens as workers do: of
a score all but the last one. What is left between the two is what messages, the broker and the processor take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from lemix_common.errors import BadInput
from lemix_coordinator.expectations import SLO_FACTOR
from lemix_coordinator.scheduling.policies import PolicyOptions, Preference, make_policy
from lemix_coordinator.scheduling.work import Work
from lemix_studies.experiments.live import CONTEXT_LENGTH, LivePlan, plan_live, scratch_folder
from lemix_studies.experiments.live_measures import in_its_time
from lemix_studies.experiments.settings import Point
from lemix_studies.experiments.workloads import Sources
from lemix_studies.probing import NUM_PROBES
from lemix_studies.simulator import Scenario, measures, simulate, slo_base_s
from lemix_studies.simulator.scenario import MicrobatchSchedule, Order
from lemix_studies.workload import PlannedArrival


def simulated_twin(
    point: Point, *, sources: Sources | None = None, slowdown: float | None = None
) -> dict[str, object]:
    """The measures that `run_live` would have of an emulated cluster that takes no time of its own."""
    with scratch_folder() as folder:
        plan = plan_live(point, on="emulated", model=None, folder=folder, sources=sources, slowdown=slowdown)
    return in_its_time(measures(simulate(twin_of(plan))), plan.slowdown)


def twin_of(plan: LivePlan) -> Scenario:
    """What is simulated, in the slowed accelerators' time. `BadInput` for steps that overlap: no twin has them."""
    settings, profile = plan.settings, plan.profile
    if profile is None:
        raise BadInput("only emulated accelerators have a simulated twin")
    requests = [arrival for arrival in plan.arrivals if arrival.kind != "train"]
    works = [_request(arrival, number) for number, arrival in enumerate(requests, start=NUM_PROBES + 1)]
    slo_s = settings.slo_s or SLO_FACTOR * slo_base_s(profile, works)
    options = PolicyOptions(
        seed=settings.seed,
        training_rate=settings.training_share,
        prefer=cast("Preference", settings.prefer),
        slo_s=slo_s,
    )
    return Scenario(
        profile=replace(profile, load_s=0.0),  # nodes that rest keep their weights
        nodes=settings.nodes,
        policy=make_policy(settings.policy, options),
        requests=works,
        training=_steps(plan.arrivals, settings.step_examples),
        release="a-pp" if settings.schedule == "a-pp" else "s-pp",
        microbatches=settings.microbatches or 1,
        schedule=cast("MicrobatchSchedule", settings.schedule),
        order=cast("Order", settings.order),
        decode_batch=settings.max_running // settings.stages,
        pass_tokens=CONTEXT_LENGTH,
        max_block_s=settings.max_block_ms / 1000,
        min_training_share=settings.min_training_share,
        slo_s=slo_s,
        seed=settings.seed,
    )


def _request(arrival: PlannedArrival, number: int) -> Work:
    prompt, reference = len(arrival.prompt), len(arrival.reference)
    is_score = arrival.kind == "score"
    return Work(
        item=f"item-{arrival.line:06d}",
        number=number,
        kind="score" if is_score else "generate",
        lengths=(prompt + reference - 1 if is_score else prompt,),
        arrived_at=arrival.at_s,
        new_tokens=0 if is_score else reference,
    )


def _steps(arrivals: Sequence[PlannedArrival], step_examples: int) -> list[Work]:
    """So many examples each, in order; the first one is to be computed by the first node."""
    examples = [arrival for arrival in arrivals if arrival.kind == "train"]
    return [
        Work(
            item=f"step-{number:05d}",
            number=number,
            kind="train",
            lengths=tuple(
                len(one.prompt) + len(one.reference) - 1 for one in examples[first : first + step_examples]
            ),
            arrived_at=examples[first].at_s,
        )
        for number, first in enumerate(range(0, len(examples), step_examples))
    ]
