"""What the leading coordinator believes of its cluster: a state that predicts, kept true by what is known for certain.

Certain is what stands in Redis: which nodes are ready, and which items each node's stream holds. A leader begins with
that alone (`LiveState.begin`, then `with_outstanding`), so one that dies takes nothing with it but predictions that are
a little better. Between two looks, what workers say of what ran replaces what was predicted, and puts the costs right.

Pure: every event makes another value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, TypeVar

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_coordinator.scheduling.cluster_state import TRAINING, ClusterState
from lemix_coordinator.scheduling.columns import columns_of
from lemix_coordinator.scheduling.correction import Corrections, ResponseCorrections
from lemix_coordinator.scheduling.node_state import node_since
from lemix_coordinator.scheduling.pass_times import iteration_of
from lemix_coordinator.scheduling.prediction import trace
from lemix_coordinator.scheduling.work import Work

LAYER_S: Final = 2e-4
LAYER_TOKEN_S: Final = 2e-6
"""What a layer takes where nothing is known: any figure does, since the first measurements put it right."""
NO_LIMIT_BYTES: Final = 2**62
DRIFT: Final = 1.1
"""Costs that are off by more than this are replaced by the corrected ones."""


Known = TypeVar("Known")


@dataclass(frozen=True, slots=True)
class LiveState:
    """The cluster as its leader sees it."""

    base: Profile
    """Before any correction."""
    cluster: ClusterState
    corrections: Corrections = field(default_factory=Corrections)
    responses: ResponseCorrections = field(default_factory=ResponseCorrections)
    placed: Mapping[str, tuple[float, bool]] = field(default_factory=lambda: MappingProxyType({}))
    """Of each of these works, when it was given to its node, and whether that had training then."""
    where: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Each work that is on a node, and that node."""

    @classmethod
    def begin(
        cls, profile: Profile, nodes: int, now: float, *, training_gives_way: bool = False
    ) -> LiveState:
        """Nothing is known but the profile: no node is ready."""
        cluster = ClusterState.idle(profile, nodes, now, training_gives_way=training_gives_way)
        for node in range(nodes):
            cluster = cluster.closed(node)
        return cls(profile, cluster)

    def with_ready(self, ready: Collection[int], now: float) -> LiveState:
        """These nodes can take work, and no others."""
        cluster = self.cluster
        for node in range(cluster.num_nodes):
            if node in ready and not cluster.is_open_N[node]:
                cluster = cluster.opening(node, now)
            elif node not in ready and cluster.is_open_N[node]:
                cluster = cluster.closed(node)
        return replace(self, cluster=cluster)

    def with_work(self, work: Work, node: int, now: float) -> LiveState:
        """It was given to a node; from another one, if it was there."""
        state = self.without(work.item, now)
        cluster = state.cluster.assigned(work, node, now)
        where = MappingProxyType({**state.where, work.item: node})
        placed = MappingProxyType({**state.placed, work.item: (now, state.trains(node))})
        return replace(state, cluster=cluster, where=where, placed=placed)

    def without(self, item: str, now: float) -> LiveState:
        """It has ended, or was taken back."""
        if item not in self.where:
            return self
        cluster = self.cluster.ended(item, self.where[item], now)
        return replace(
            self, cluster=cluster, where=_without(self.where, item), placed=_without(self.placed, item)
        )

    def with_answer(self, item: str, ended_at: float) -> LiveState:
        """A request was answered; the next ones' predictions learn from it."""
        committed = self.cluster.nodes[self.where[item]].find(item) if item in self.where else None
        if committed is None:
            return self
        placed_at, beside_training = self.placed[item]
        responses = self.responses.noted(
            committed.kind,
            beside_training,
            predicted_s=committed.arrived_at + committed.response_s - placed_at,
            measured_s=ended_at - placed_at,
        )
        return replace(self, responses=responses).without(item, ended_at)

    def end_of(self, work: Work, node: int, now: float) -> float:
        """When the work is expected to end if it is given to a node now, by how earlier ones' ends were off."""
        left_s = work.arrived_at + trace(self.cluster, work, node, now).response_s - now
        return now + self.responses.of(work.kind, self.trains(node), left_s)

    def trains(self, node: int) -> bool:
        """Whether training is on a node."""
        return bool(self.cluster.facts_FN[TRAINING, node])

    def gone(self, held: Mapping[str, int]) -> list[str]:
        """Requests that are no longer where they were, by what nodes' streams hold."""
        return [item for item, node in self.where.items() if held.get(item) != node and not is_training(item)]

    def with_outstanding(
        self, held: Mapping[str, int], unknown: Iterable[tuple[Work, int]], now: float
    ) -> LiveState:
        """The requests that nodes' streams hold, and where: others have ended; ``unknown`` ones are added, in order."""
        state = self
        for item in self.gone(held):
            state = state.without(item, now)
        for work, node in unknown:
            state = state.with_work(work, node, now)
        return state.with_idle_nodes(now)

    def with_idle_nodes(self, now: float) -> LiveState:
        """A node that has nothing is free now, whatever was predicted of it."""
        busy = set(self.where.values())
        late = [
            node
            for node, known in enumerate(self.cluster.nodes)
            if node not in busy and max(known.free_S) > now
        ]
        if not late:
            return self
        fresh = node_since(self.cluster.profile.num_stages, now)
        nodes = tuple(fresh if node in late else known for node, known in enumerate(self.cluster.nodes))
        columns = None if self.cluster.columns is None else columns_of(nodes)
        return replace(self, cluster=replace(self.cluster, nodes=nodes, columns=columns))

    def with_spans(self, spans: Iterable[Mapping[str, Any]], pieces: Mapping[str, str]) -> LiveState:
        """What ran. ``pieces``: the last microbatch of each work that trains, as spans name it, to that work."""
        known = list(spans)
        cluster = self.cluster
        for span in known:
            node, stage = int(span["node"]), int(span["stage"])
            about = (node, stage, float(span["start"]), float(span["end"]))
            if not (node < cluster.num_nodes and stage < cluster.profile.num_stages):
                continue
            match span["cat"]:
                case "prefill":
                    for item in (span["item"], *span.get("others", ())):
                        cluster = cluster.forward_measured(item, *about)
                case "training_forward" if span["item"] in pieces:
                    cluster = cluster.forward_measured(pieces[span["item"]], *about)
                case "training_backward" if span["item"] in pieces:
                    cluster = cluster.backward_measured(pieces[span["item"]], *about)
        corrections = self.corrections.noted(self.base, known)
        profile = corrections.applied_to(self.base)
        if _differ(profile, cluster.profile):
            cluster = replace(cluster, profile=profile, iteration=iteration_of(profile))
        return replace(self, cluster=cluster, corrections=corrections)


def is_training(item: str) -> bool:
    """Whether a work is a piece of a step, by its name."""
    return item.startswith(_STEP)


def shard_name(run: str, step: int, shard: int) -> str:
    """What the piece of a step is called that one virtual shard is."""
    return f"{_STEP}{run}:{step}:{shard}"


def neutral_profile(layers: Sequence[int]) -> Profile:
    """Costs by the number of layers of each stage, for a cluster of which nothing is known; no memory is scarce."""
    return Profile(
        model="",
        device="",
        source="roofline",
        stages=tuple(_neutral_stage(max(1, count)) for count in layers),
        hop=Cost(LAYER_S),
        memory_bytes=NO_LIMIT_BYTES,
        load_s=0.0,
    )


def _neutral_stage(layers: int) -> StageCosts:
    return StageCosts(
        forward=Cost(LAYER_S * layers, LAYER_TOKEN_S * layers),
        backward=Cost(2 * LAYER_S * layers, 2 * LAYER_TOKEN_S * layers),
        decode=Cost(LAYER_S * layers, LAYER_TOKEN_S * layers),
        optimizer_s=LAYER_S * layers,
        activation_bytes=Cost(),
        kv_token_bytes=0.0,
        weight_bytes=0,
        training_bytes=0,
    )


_STEP: Final = "step:"
_SAMPLE_TOKENS: Final = (64.0, 512.0)


def _without(known: Mapping[str, Known], item: str) -> Mapping[str, Known]:
    return MappingProxyType({name: value for name, value in known.items() if name != item})


def _differ(one: Profile, other: Profile) -> bool:
    pairs = [
        (line_one.of(tokens), line_other.of(tokens))
        for stage_one, stage_other in zip(one.stages, other.stages, strict=True)
        for line_one, line_other in (
            (stage_one.forward, stage_other.forward),
            (stage_one.forward_of(is_training=True), stage_other.forward_of(is_training=True)),
            (stage_one.backward, stage_other.backward),
            (stage_one.decode, stage_other.decode),  # rows are rounded alike in both
        )
        for tokens in _SAMPLE_TOKENS
    ]
    return any(max(pair) > DRIFT * min(pair) for pair in pairs)
