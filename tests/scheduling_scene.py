"""A small profile, works for it, and states of clusters: what the scheduler's tests look at."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.policies import Policy
from lemix_coordinator.scheduling.work import Work, WorkKind

HOP_S = 0.001


def profile(stages: int = 2) -> Profile:
    """Each stage a little slower than the one before it."""
    return Profile(
        model="small",
        device="none",
        source="roofline",
        stages=tuple(_stage(0.004 + 0.001 * stage) for stage in range(stages)),
        hop=Cost(HOP_S),
        memory_bytes=10**9,
        load_s=2.0,
    )


def _stage(base_s: float) -> StageCosts:
    return StageCosts(
        forward=Cost(base_s, 2e-5, 1e-9),
        backward=Cost(2 * base_s, 4e-5, 2e-9),
        decode=Cost(base_s, 1e-5, 1e-9),
        optimizer_s=0.003,
        activation_bytes=Cost(0.0, 1e5),
        kv_token_bytes=1e4,
        weight_bytes=10**8,
        training_bytes=3 * 10**8,
    )


def work(
    number: int = 0,
    *,
    kind: WorkKind = "score",
    lengths: tuple[int, ...] = (100,),
    at: float = 0.0,
    new_tokens: int = 0,
) -> Work:
    """One work."""
    return Work(
        item=str(number), number=number, kind=kind, lengths=lengths, arrived_at=at, new_tokens=new_tokens
    )


def works(count: int, *, seed: int = 0, rate: float = 60.0, training: float = 0.3) -> Iterator[Work]:
    """Requests and training that come at random moments."""
    randomness = random.Random(seed)
    now = 0.0
    for number in range(count):
        now += randomness.expovariate(rate)
        kind: WorkKind = "train" if randomness.random() < training else "score"
        yield work(number, kind=kind, lengths=(randomness.randint(5, 400),), at=now)


def filled(state: ClusterState, count: int, *, seed: int = 0, first: int = 0) -> ClusterState:
    """With works at random on its nodes, all placed at the beginning."""
    randomness = random.Random(seed)
    for one in works(count, seed=seed):
        node = randomness.randrange(state.num_nodes)
        state = state.assigned(work(first + one.number, kind=one.kind, lengths=one.lengths), node, 0.0)
    return state


def placements(policy: Policy, state: ClusterState, load: Iterator[Work]) -> list[int | None]:
    """Where each goes, none ever ending."""
    nodes = []
    for one in load:
        decision = policy.place(state, one, one.arrived_at)
        nodes.append(decision.node)
        if decision.node is not None:
            state = state.assigned(one, decision.node, one.arrived_at)
    return nodes
