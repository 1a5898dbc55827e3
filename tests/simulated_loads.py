"""Policies for tests of the simulator, and loads for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.work import Decision, Resize, Work, WorkKind


@dataclass(frozen=True)
class ByTurns:
    """Item k goes to node k modulo their number, and nodes change at the moments that are told."""

    resizes: Mapping[float, Resize] = field(default_factory=dict)
    """By their moment, in tenths of a second."""
    uses_state: bool = True
    name: str = "by-turns"

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        del now
        is_open = [node for node in range(state.num_nodes) if state.is_open_N[node]]
        return Decision(node=is_open[work.number % len(is_open)])

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        del state, waiting
        return self.resizes.get(round(now, 1), Resize())


def line_profile(
    stages: int = 2,
    *,
    forward: Cost = Cost(base=0.01, token=1e-4),  # noqa: B008 - a frozen value
    hop: Cost = Cost(),  # noqa: B008
    memory_bytes: int = 10**9,
    kv_token_bytes: float = 0.0,
    activation_bytes: Cost = Cost(),  # noqa: B008
    load_s: float = 1.0,
) -> Profile:
    """Equal stages; a backward is two forwards, an optimizer step 5 ms, a decode iteration 10 ms."""
    backward = Cost(base=2 * forward.base, token=2 * forward.token, context=2 * forward.context)
    stage = StageCosts(
        forward=forward,
        backward=backward,
        decode=Cost(base=0.01),
        optimizer_s=0.005,
        activation_bytes=activation_bytes,
        kv_token_bytes=kv_token_bytes,
        weight_bytes=0,
        training_bytes=0,
    )
    return Profile(
        model="lines",
        device="none",
        source="roofline",
        stages=(stage,) * stages,
        hop=hop,
        memory_bytes=memory_bytes,
        load_s=load_s,
    )


def work_of(
    number: int, at: float = 0.0, *, kind: WorkKind = "score", lengths: tuple[int, ...] = (100,), new: int = 0
) -> Work:
    return Work(
        item=f"{kind}-{number}", number=number, kind=kind, lengths=lengths, arrived_at=at, new_tokens=new
    )


def poisson_load(
    count: int, rate: float, *, seed: int = 0, share: float = 0.4, kind: WorkKind = "score", new: int = 0
) -> tuple[list[Work], list[Work]]:
    """Requests at random times and training, of random lengths."""
    randomness = random.Random(seed)
    requests: list[Work] = []
    training: list[Work] = []
    now = 0.0
    for number in range(count):
        lengths = tuple(randomness.randint(10, 400) for _ in range(2))
        if randomness.random() < share:
            training.append(work_of(number, kind="train", lengths=lengths))
        else:
            now += randomness.expovariate(rate)
            requests.append(work_of(number, now, kind=kind, lengths=lengths, new=new))
    return requests, training
