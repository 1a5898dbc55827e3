"""How near the simulator is to the services: the same arrivals in an emulated cluster and in its simulated twin.

A round has a seed of its own, and so other lengths and arrivals. A sample is a round's 95th percentile of the
responses, in the time of the accelerators that are meant. A millisecond early on may decide who waits behind whom, and
change a single round's percentile by a tenth; so a case is judged by the median of its rounds' ratios.

The cluster is the real one but for computing: broker, coordinator, workers' loops, messages, steps and commits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Final, cast

from lemix_benchmarks.report import Findings, Plan, Row, Target
from lemix_studies.accelerators import profile_of
from lemix_studies.experiments.live import run_live
from lemix_studies.experiments.settings import Point, Setting, Variant
from lemix_studies.experiments.twin import simulated_twin
from lemix_studies.experiments.workloads import Sources, workload_of

MODEL: Final = "dialogpt-large"
CONTEXT_LENGTH: Final = 1024
QUICK: Final = 4
"""One round with a fourth of the items: too few to be judged, so there are no targets."""
MOST_THROUGHPUT_ERROR: Final = 0.03
MOST_P95_ERROR: Final = 0.10
THROUGHPUT: Final = "items_per_second"


@dataclass(frozen=True, slots=True)
class Case:
    """A point, by its load."""

    name: str
    policy: str
    load: float
    """Requests a second ÷ those that the cluster could serve if it did nothing else, one a pass."""
    training_rate: float
    items: int
    nodes: int


CASES: Final = (
    Case("naive_mix_30", "naive-mix", load=0.3, training_rate=0.0, items=50, nodes=2),
    Case("naive_mix_60_training", "naive-mix", load=0.6, training_rate=0.1, items=100, nodes=4),
    Case("jsq_80_training", "jsq", load=0.8, training_rate=0.03, items=200, nodes=4),
)
"""In the second one the makespan is training's, step behind step, in the others that of the arrivals."""


def run(plan: Plan) -> Findings:
    """Measure every case in every round."""
    rounds, part = (1, QUICK) if plan.quick else (5, 1)
    found: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {case.name: [] for case in CASES}
    for number in range(rounds):
        for case in CASES[::-1] if number % 2 else CASES:
            point = point_of(case, case.items // part, seed=plan.seed + number)
            sources = Sources(context_lengths={MODEL: CONTEXT_LENGTH})
            measured = run_live(point, on="emulated", model=None, sources=sources)
            found[case.name].append((_figures(measured), _figures(simulated_twin(point, sources=sources))))
    rows = tuple(
        Row(
            case,
            subject,
            tuple(pair[which]["p95"] for pair in pairs),
            further={name: median(pair[which][name] for pair in pairs) for name in ("p50", THROUGHPUT)},
        )
        for case, pairs in found.items()
        for which, subject in enumerate(("lemix", "simulator"))
    )
    ratios = {
        f"{case}_{short}": median(twin[name] / measured[name] for measured, twin in pairs)
        for case, pairs in found.items()
        for short, name in (("throughput", THROUGHPUT), ("p95", "p95"), ("p50", "p50"))
    }
    return Findings(
        rounds=rounds,
        threads=1,
        model=None,
        rows=rows,
        ratios=ratios,
        targets=()
        if plan.quick
        else (
            Target("throughput_error", _error(ratios, "throughput"), "<=", MOST_THROUGHPUT_ERROR),
            Target("p95_error", _error(ratios, "p95"), "<=", MOST_P95_ERROR),
        ),
        further={"emulated": f"{MODEL} on a100-80g"},
    )


def point_of(case: Case, items: int, *, seed: int) -> Point:
    """The case's point of a seed."""
    setting = Setting(
        study="simulator",
        model=MODEL,
        nodes=case.nodes,
        stages=2,
        rate=1.0,
        training_rate=case.training_rate,
        items=items,
        seed=seed,
    )
    requests = workload_of(setting, Sources(context_lengths={MODEL: CONTEXT_LENGTH})).requests
    profile = profile_of(setting.model, setting.device, setting.stages)
    slowest_s = max(
        sum(stage.forward.of(work.tokens, work.contexts) for work in requests) for stage in profile.stages
    )
    rate = case.load * case.nodes * len(requests) / slowest_s
    return Point(replace(setting, rate=rate), Variant(policy=case.policy))


def _figures(measures: dict[str, object]) -> dict[str, float]:
    response_s = cast("dict[str, float]", measures["response_s"])
    return {
        "p50": response_s["p50"],
        "p95": response_s["p95"],
        THROUGHPUT: cast("float", measures[THROUGHPUT]),
    }


def _error(ratios: dict[str, float], name: str) -> float:
    """Of the case that is farthest off."""
    return max(abs(ratios[f"{case.name}_{name}"] - 1) for case in CASES)
