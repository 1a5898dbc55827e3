"""How many nodes a load needs, by simulating it: the fewest constant ones, and what a policy holds that resizes.

The fewest are looked for by doubling and then halving, from the number that the stages' busy time asks for. Requests go
to the node with the shortest queue; training runs beside them, one step at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from lemix_common.costs import Profile
from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.policies import POLICY_NAMES, PolicyOptions, make_policy
from lemix_coordinator.scheduling.work import Work
from lemix_studies.measures import GOODPUT_FACTOR, percentiles
from lemix_studies.simulator import Outcome, Record, Scenario, idle_times, simulate
from lemix_studies.simulator.bounds import busy_s
from lemix_studies.traces import TraceLine
from lemix_studies.workload import WorkloadOptions, fit_lengths, scale_length

CONSTANT_POLICY = "jsq"
ATTAINMENT = 0.99
MOST_NODES = 512
ELASTIC_ROOM = 2
"""So many times the constant nodes may a policy have that opens and closes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What has to be kept, and how it is simulated."""

    slo_s: float
    """Of a score, or a generation's first token."""
    attainment: float = ATTAINMENT
    """Of the requests, the share that has to keep it."""
    policy: str = "lemix"
    """That opens and closes nodes."""
    decode_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            raise BadInput(f"--attainment {self.attainment}: must be above 0 and at most 1")
        if self.decode_batch < 1:
            raise BadInput(f"--decode-batch {self.decode_batch}: must be at least 1")
        if self.policy not in POLICY_NAMES:
            raise BadInput(f"there is no policy {self.policy!r}: use {', '.join(POLICY_NAMES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be served, and what is trained meanwhile."""

    requests: tuple[Work, ...]
    training: tuple[Work, ...]
    capped: int
    """Items whose lengths were cut to the model's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one way of holding nodes came to."""

    policy: str
    nodes: int
    """At most, at a time."""
    node_seconds: float
    nodes_mean: float
    slo_attainment: float
    response_s: dict[str, float | None]
    ttft_s: dict[str, float | None]
    itl_s: dict[str, float | None]
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer; figures by name as in all reports."""

    model: str
    device: str
    stages: int
    slo_s: float
    attainment: float
    requests: int
    training: int
    capped: int
    constant: Held
    elastic: Held

    def as_json(self) -> dict[str, object]:
        """One object of plain values."""
        return asdict(self)


def load_of(trace: Sequence[TraceLine], options: WorkloadOptions, *, context_length: int | None) -> Load:
    """A trace's lines as work, times and lengths scaled; of a replay's rules."""
    limit_s = math.inf if options.minutes is None else 60 * options.minutes
    requests: list[Work] = []
    training: list[Work] = []
    capped = 0
    for number, line in enumerate(line for line in trace if line.arrival_s < limit_s):
        wanted = scale_length(line.input_tokens, options), scale_length(line.output_tokens, options)
        prompt, reference = fit_lengths(*wanted, context_length) if context_length else wanted
        capped += (prompt, reference) != wanted
        trains = options.train_every > 0 and number % options.train_every == 0
        is_generation = not trains and options.task == "generate"
        (training if trains else requests).append(
            Work(
                item=f"line-{number}",
                number=number,
                kind="train" if trains else options.task,
                lengths=(prompt if is_generation else prompt + reference,),
                arrived_at=line.arrival_s * options.time_scale,
                new_tokens=reference if is_generation else 0,
            )
        )
    if not requests:
        raise BadInput("there is no request in this load: more minutes, or fewer training examples")
    return Load(requests=tuple(requests), training=tuple(training), capped=capped)


def plan_nodes(
    profile: Profile, load: Load, target: Target, *, told: Callable[[str], None] = lambda _: None
) -> Plan:
    """Simulate until the fewest nodes are found; ``told`` gets a line before each simulation.

    A target that no number of nodes reaches is a `BadInput`.
    """

    def held_by(name: str, nodes: int) -> Held:
        told(f"{name} on {nodes} node{'s' * (nodes > 1)}")
        return _held(name, simulate(_scenario(profile, load, target, name, nodes)), target.slo_s)

    def is_enough(nodes: int) -> bool:
        known[nodes] = held_by(CONSTANT_POLICY, nodes)
        return known[nodes].slo_attainment >= target.attainment

    known: dict[int, Held] = {}
    fewest = _fewest(is_enough, start=_busy_nodes(profile, load, target.decode_batch))
    if fewest is None:
        best = max(found.slo_attainment for found in known.values())
        raise BadInput(
            f"no number of nodes keeps {target.slo_s:g} s for {100 * target.attainment:g} % of the requests: "
            f"{MOST_NODES} keep it for {100 * best:.1f} %; take more stages, another device, or a larger SLO"
        )
    return Plan(
        model=profile.model,
        device=profile.device,
        stages=profile.num_stages,
        slo_s=target.slo_s,
        attainment=target.attainment,
        requests=len(load.requests),
        training=len(load.training),
        capped=load.capped,
        constant=known[fewest],
        elastic=held_by(target.policy, ELASTIC_ROOM * fewest),
    )


def _scenario(profile: Profile, load: Load, target: Target, policy: str, nodes: int) -> Scenario:
    options = PolicyOptions(seed=target.seed, slo_s=_response_slo_s(profile, load, target))
    return Scenario(
        profile=profile,
        nodes=nodes,
        policy=make_policy(policy, options),
        requests=load.requests,
        training=load.training,
        order="urgency",
        decode_batch=target.decode_batch,
        slo_s=target.slo_s,
        seed=target.seed,
    )


def _response_slo_s(profile: Profile, load: Load, target: Target) -> float:
    """What policies go by, whole responses: behind the first token as many times an idle node's time as usual."""
    idle = idle_times(profile, load.requests)
    return target.slo_s + GOODPUT_FACTOR * (idle.slo_base_s - idle.ttft_s)


def _held(policy: str, outcome: Outcome, slo_s: float) -> Held:
    """The figures of an outcome."""
    requests = [record for record in outcome.records if record.kind != "train"]
    return Held(
        policy=policy,
        nodes=most_at_once(outcome.held),
        node_seconds=outcome.node_seconds,
        nodes_mean=outcome.node_seconds / outcome.duration_s if outcome.duration_s else 0.0,
        slo_attainment=sum(_is_in_time(record, slo_s) for record in requests) / len(requests),
        response_s=percentiles(record.response_s for record in requests),
        ttft_s=percentiles(_ttft_s(record) for record in requests),
        itl_s=percentiles(gap for record in requests for gap in record.gaps_s),
        duration_s=outcome.duration_s,
    )


def _is_in_time(record: Record, slo_s: float) -> bool:
    """Whether the score, or the first token, came within the SLO."""
    ttft_s = _ttft_s(record)
    return (record.response_s if ttft_s is None else ttft_s) <= slo_s


def most_at_once(held: Sequence[tuple[int, float, float]]) -> int:
    """Nodes that held weights at one time."""
    changes = sorted(change for _, since, to in held for change in ((since, 1), (to, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _ttft_s(record: Record) -> float | None:
    return None if record.first_token_at is None else record.first_token_at - record.arrived_at


def _busy_nodes(profile: Profile, load: Load, decode_batch: int) -> int:
    """Fewer would fall behind: what the busiest stage has to do, of the time from first to last arrival."""
    arrivals_s = load.requests[-1].arrived_at - load.requests[0].arrived_at
    busiest_s = max(
        sum(busy_s(work, stage, profile, decode_batch=decode_batch) for work in load.requests)
        for stage in range(profile.num_stages)
    )
    return min(MOST_NODES, max(1, int(busiest_s / arrivals_s) if arrivals_s else 1))


def _fewest(is_enough: Callable[[int], bool], *, start: int) -> int | None:
    """The least number that is enough, if more always are when fewer are."""
    too_few, enough = _bracket(is_enough, start)
    if enough is None:
        return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_enough(middle) else (middle, enough)
    return enough


def _bracket(is_enough: Callable[[int], bool], start: int) -> tuple[int, int | None]:
    """A number that is too small (0 is), and one that is enough, if there is one."""
    nodes = start
    if is_enough(nodes):
        while nodes > 1:
            fewer = nodes // 2
            if not is_enough(fewer):
                return fewer, nodes
            nodes = fewer
        return 0, nodes
    while nodes < MOST_NODES:
        fewer, nodes = nodes, min(2 * nodes, MOST_NODES)
        if is_enough(nodes):
            return fewer, nodes
    return nodes, None
