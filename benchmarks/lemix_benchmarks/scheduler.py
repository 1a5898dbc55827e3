"""How fast the scheduler decides: policy `lemix`, 10,000 works that all wait from the beginning.

Each decision predicts the work's way through every node, costs it, chooses, and replaces the state by one with the work
committed to its node; nothing is remembered from one decision to the next but that state. Half of the works train, and
training isn't put off, so that every decision places something and backwards pile up: the predictor's worst case. Nodes
have 8 stages. A sample is a round's decisions a second.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Final

from lemix_benchmarks.report import Findings, Plan, Row, Target, percentile_99
from lemix_common.costs import Cost, Profile, StageCosts
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies import PolicyOptions, make_policy
from lemix_coordinator.scheduling.work import Work

STAGES: Final = 8
NODES: Final = (8, 64, 1000)
QUEUED: Final = 10_000
QUICK_QUEUED: Final = 1_000
UNIT: Final = "decisions/s"

_STAGE: Final = StageCosts(
    forward=Cost(1e-3, 2e-6, 1e-10),
    backward=Cost(2e-3, 4e-6, 2e-10),
    decode=Cost(1e-3, 2e-6, 1e-8),
    optimizer_s=1e-3,
    activation_bytes=Cost(0.0, 1e5),
    kv_token_bytes=2e4,
    weight_bytes=2 * 10**9,
    training_bytes=6 * 10**9,
)
PROFILE: Final = Profile(
    model="bench",
    device="none",
    source="roofline",
    stages=(_STAGE,) * STAGES,
    hop=Cost(2e-5, 1e-8),
    memory_bytes=80 * 2**30,
    load_s=2.0,
)


def run(plan: Plan) -> Findings:
    """Measure every cluster, in rounds."""
    rounds, queued = (3, QUICK_QUEUED) if plan.quick else (5, QUEUED)
    rows = tuple(_row(nodes, works(queued, plan.seed), rounds) for nodes in NODES)
    by_case = {row.case: row for row in rows}
    return Findings(
        rounds=rounds,
        threads=1,
        model=None,
        rows=rows,
        ratios={},
        targets=(
            Target("nodes_64_decisions_per_second", _per_second(by_case["nodes_64"]), ">=", 5_000.0),
            Target("nodes_64_p99_s", float(by_case["nodes_64"].further["p99_s"]), "<=", 1e-3),
            Target("nodes_1000_decisions_per_second", _per_second(by_case["nodes_1000"]), ">=", 1_000.0),
        ),
        further={"stages": STAGES, "queued": queued},
    )


def works(queued: int, seed: int) -> list[Work]:
    """Requests and training, three rows each, of lengths like those of the paper's texts."""
    randomness = random.Random(seed)
    return [
        Work(
            item=str(number),
            number=number,
            kind="train" if randomness.random() < 0.5 else "score",
            lengths=tuple(min(int(randomness.lognormvariate(4.8, 0.7)) + 5, 1024) for _ in range(3)),
            arrived_at=0.0,
        )
        for number in range(queued)
    ]


def decide_all(nodes: int, queued: list[Work]) -> list[float]:
    """Seconds of each decision."""
    policy = make_policy("lemix", PolicyOptions(slo_s=0.1, prioritises=False))
    state = ClusterState.idle(PROFILE, nodes)
    seconds = []
    for work in queued:
        began = time.perf_counter()
        decision = policy.place(state, work, 0.0)
        assert decision.node is not None
        state = state.assigned(work, decision.node, 0.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def _row(nodes: int, queued: list[Work], rounds: int) -> Row:
    decide_all(nodes, queued[:100])
    taken = [decide_all(nodes, queued) for _ in range(rounds)]
    samples = tuple(len(seconds) / sum(seconds) for seconds in taken)
    further = {
        "decisions_per_second": median(samples),
        "p99_s": median(percentile_99(seconds) for seconds in taken),
    }
    return Row(f"nodes_{nodes}", "lemix", samples, UNIT, further)


def _per_second(row: Row) -> float:
    return median(row.samples)
