"""The leader's scheduler: keeps what is known of the cluster, and asks the policy where work goes.

What it knows it can lose: it is read again from the nodes' streams (`scheduling/live.py`). A policy that fails, or
that holds a step back for too long, is overruled by the plain rule of `policies`, so nothing waits for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import structlog

from lemix_common.broker import Broker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import Items
from lemix_common.store.training import PlannedStep, RunState, Training
from lemix_coordinator.expectations import SLO_FACTOR, IdleTimes, objective_of
from lemix_coordinator.policies import place_item, share_step
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.live import LiveState, neutral_profile, shard_name
from lemix_coordinator.scheduling.policies import Policy, PolicyOptions, Preference, make_policy
from lemix_coordinator.scheduling.work import Decision, Resize, Work
from lemix_coordinator.view import ClusterView

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
LOOK_SHARE = 10
"""A look at the streams takes at most one part in so many of the coordinator's time."""
HOLD_AT_MOST_S = 2.0
"""How long a policy may hold back a step that could run."""
FIRST_SLO_S: Final = 1.0
"""Until it is known what requests take."""
ANOTHER_SLO: Final = 1.05
"""A policy is told of another objective when it is off by more than this."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and what its hash is to say of it."""

    node: int
    about: Mapping[str, str]


@dataclass
class Scheduler:
    """Of one leader."""

    settings: ClusterSettings
    broker: Broker
    choose: Callable[[ClusterSettings, float], Policy] = field(default_factory=lambda: policy_of)
    """The policy for an objective of so many seconds."""
    live: LiveState | None = None
    resting: frozenset[int] = frozenset()
    """Ready nodes that the policy does without."""
    number: int = 0
    """Requests seen by this leader."""
    idle: IdleTimes = field(default_factory=IdleTimes)
    has_profile: bool = False
    _events: str = ""
    _looked_at: float = 0.0
    _look_took_s: float = 0.0
    _wanted: tuple[tuple[int, int], float] = ((0, 0), 0.0)
    """The step that could run (with the attempt before it), and since when."""
    _pieces: dict[str, str] = field(default_factory=dict)
    _shards: dict[int, list[str]] = field(default_factory=dict)
    """By step, the works it was given out as."""
    _attempt: int = 0

    def __post_init__(self) -> None:
        self.items, self.training = Items(self.broker), Training(self.broker, MAIN_RUN)
        self._slo_s = self.settings.slo_s or FIRST_SLO_S
        self.policy = self.choose(self.settings, self._slo_s)

    def forget(self) -> None:
        """Another leader was here meanwhile: begin again from what stands in Redis."""
        self.live = None

    # ---- what is known
    def look(self, view: ClusterView, waiting: Sequence[Work] = ()) -> None:
        """Take in what has happened."""
        now = self.broker.clock.now()
        live = self.live or self._begin(now)
        ready = frozenset(node.node for node in view.nodes if node.is_ready)
        if not ready - self.resting:
            self.resting = frozenset()
        live = live.with_ready(ready - self.resting, now)
        live = live.with_spans(self._spans(), self._pieces)
        live = self._without_ended_steps(live, view.run, now)
        self.live = live
        if now - self._looked_at >= LOOK_EVERY_S:
            self.refresh()
        self._choose_policy()
        if self.policy.uses_state:
            self._resize(waiting, ready, now)

    def refresh(self) -> None:
        """Find out what has ended, before work is placed; not again at once where that takes long."""
        now = self.broker.clock.now()
        if self.live is not None and now - self._looked_at >= LOOK_SHARE * self._look_took_s:
            self.live = self._with_streams(self.live, now)
            self._looked_at, self._look_took_s = now, self.broker.clock.now() - now

    def _begin(self, now: float) -> LiveState:
        """A state that knows the profile only."""
        profile = Cluster(self.broker).profile()
        self.has_profile = profile is not None and profile.num_stages == self.settings.stages
        if profile is None or not self.has_profile:
            layers = int(self.broker.hash(self.broker.keys.model).get("num_layers") or self.settings.stages)
            profile = neutral_profile([layers // self.settings.stages] * self.settings.stages)
        self._events = self.broker.last_id(self.broker.keys.events)
        self._pieces, self._shards, self._looked_at = {}, {}, 0.0
        gives_way = self.settings.order == "urgency"
        return LiveState.begin(profile, self.settings.nodes, now, training_gives_way=gives_way)

    def _spans(self) -> list[Mapping[str, Any]]:
        """What ran since the last look."""
        entries = self.broker.read({self.broker.keys.events: self._events}, block_s=0.001)
        if entries:
            self._events = entries[-1].id
        return [span for entry in entries for span in json.loads(entry.fields.get("spans", "[]"))]

    def _with_streams(self, live: LiveState, now: float) -> LiveState:
        held: dict[str, int] = {}
        for node in range(self.settings.nodes):
            held |= {entry.fields["item"]: node for entry in self.items.work_of(node)}
        live = self._with_answers(live, live.gone(held))
        unknown = [item for item in held if item not in live.where]
        works = self.works_of(unknown)
        return live.with_outstanding(held, [(work, held[item]) for item, work in works.items()], now)

    def _with_answers(self, live: LiveState, gone: Sequence[str]) -> LiveState:
        """What those of them took that were answered."""
        hashes = self.broker.hashes(self.broker.keys.item(item) for item in gone) if gone else []
        for item, fields in zip(gone, hashes, strict=True):
            if fields.get("state") == "done":
                live = live.with_answer(item, float(fields["ended_at"]))
        return live

    def _without_ended_steps(self, live: LiveState, run: RunState, now: float) -> LiveState:
        is_other = run.attempt != self._attempt
        ended = [step for step in self._shards if is_other or step <= run.attempt_done]
        return self._without_steps(live, ended, now)

    def _without_steps(self, live: LiveState, steps: Iterable[int], now: float) -> LiveState:
        for step in steps:
            gone = self._shards.pop(step)
            for name in gone:
                live = live.without(name, now)
            self._pieces = {piece: name for piece, name in self._pieces.items() if name not in gone}
        return live

    def _choose_policy(self) -> None:
        """The same one, for what requests take by now."""
        slo_s = self.settings.slo_s or SLO_FACTOR * self.idle.response_s or FIRST_SLO_S
        if max(slo_s, self._slo_s) > ANOTHER_SLO * min(slo_s, self._slo_s):
            self._slo_s = slo_s
            self.policy = self.choose(self.settings, slo_s)

    def _resize(self, waiting: Sequence[Work], ready: frozenset[int], now: float) -> None:
        assert self.live is not None
        resize = self.policy.resize(self.live.cluster, waiting, now)
        resting = (self.resting | frozenset(resize.close)) - frozenset(resize.open)
        if resting == self.resting or not ready - resting:
            return
        log.info("nodes_used", resting=sorted(resting), reason=resize.reason)
        self.resting = resting
        self.live = self.live.with_ready(ready - resting, now)

    def works_of(self, items: Iterable[str]) -> dict[str, Work]:
        """Requests as the scheduler sees them; those that are gone left out."""
        return self._works(items, lambda _: True)

    def queued(self, items: Iterable[str]) -> dict[str, Work]:
        """Those of these requests that wait for a node."""
        return self._works(items, lambda state: state == "queued")

    def _works(self, items: Iterable[str], is_wanted: Callable[[str], bool]) -> dict[str, Work]:
        names = list(items)
        works = {}
        for item, fields in zip(
            names, self.broker.hashes(self.broker.keys.item(name) for name in names), strict=True
        ):
            if "kind" in fields and is_wanted(fields.get("state", "")):
                works[item] = replace(
                    work_of(item, fields, self.number), chunk_tokens=self.settings.max_batch_tokens
                )
                self.number += 1
        return works

    # ---- requests
    def place(self, work: Work) -> Placement | None:
        """Where a request goes; None: nowhere yet."""
        assert self.live is not None
        live, now = self.live, self.broker.clock.now()
        node = self._ask(work, now).node
        ready = self._ready()
        if node is None or not ready:
            return None
        if node not in ready:
            log.error("policy_failed", policy=self.policy.name, reason=f"node {node} takes no work")
            node = ready[work.number % len(ready)]
        self.idle = self.idle.with_request(live.cluster, work)
        ends_at = live.end_of(work, node, now)
        objective = objective_of(work, self.idle, slo_s=self.settings.slo_s, has_profile=self.has_profile)
        self.live = live.with_work(work, node, now)
        return Placement(node, {"predicted_end_at": f"{ends_at:.6f}", **objective})

    def elsewhere(self, items: Sequence[str]) -> list[int | None]:
        """Nodes for requests that have lost theirs; None: back into the queue."""
        works = self.works_of(items)
        placed = [self.place(works[item]) if item in works else None for item in items]
        return [placement.node if placement is not None else None for placement in placed]

    def _ask(self, work: Work, now: float) -> Decision:
        assert self.live is not None
        if not self._ready():
            return Decision(node=None, reason="no node is ready")
        try:
            return self.policy.place(self.live.cluster, work, now)
        except Exception as error:  # noqa: BLE001 - it may be anybody's: the plain rule goes on
            log.error("policy_failed", policy=self.policy.name, reason=f"{type(error).__name__}: {error}")
            return Decision(node=place_item(self.settings, self._ready(), work.number))

    def _ready(self) -> list[int]:
        assert self.live is not None
        return [node for node, is_open in enumerate(self.live.cluster.is_open_N.tolist()) if is_open]

    # ---- training
    def share(self, step: int, members: Sequence[int], run: RunState) -> tuple[int, ...] | None:
        """The member that computes each virtual shard of a step; None: the step waits."""
        assert self.live is not None
        planned, now = self.training.step(step), self.broker.clock.now()
        works = self._shard_works(planned, now)
        if not self.policy.uses_state or not works:
            return share_step(self.settings, members, step, shards=planned.num_shards)
        self.refresh()
        wanted = (run.attempt, step)
        if self._wanted[0] != wanted:
            self._wanted = (wanted, now)
        since = self._wanted[1]
        before, nodes = self.live, []
        plain = share_step(self.settings, members, step, shards=planned.num_shards)
        self.live = before.with_ready(frozenset(members), now)
        try:
            for shard, work in enumerate(works):
                node = plain[shard]
                if work is not None:
                    decision = self._ask(replace(work, arrived_at=since), now)
                    if decision.node is None and now - since < HOLD_AT_MOST_S:
                        return None
                    if decision.node is not None and decision.node in members:
                        node = decision.node
                    self.live = self.live.with_work(work, node, now)
                nodes.append(node)
        finally:
            self.live = before
        return tuple(nodes)

    def started(self, step: int, nodes: Sequence[int], *, attempt: int) -> None:
        """A step's shards are on these nodes from now on, and nothing is of an earlier attempt."""
        assert self.live is not None
        planned, now = self.training.step(step), self.broker.clock.now()
        if attempt != self._attempt:
            self.live = self._without_steps(self.live, list(self._shards), now)
            self._attempt = attempt
        names = []
        for shard, work in enumerate(self._shard_works(planned, now)):
            if work is not None:
                self.live = self.live.with_work(work, nodes[shard], now)
                last = max(m for m in planned.microbatches if planned.shards[m] == shard)
                self._pieces[f"{MAIN_RUN}:{step}:{last}"] = work.item
                names.append(work.item)
        self._shards[step] = names

    def _shard_works(self, planned: PlannedStep, now: float) -> list[Work | None]:
        """Each virtual shard as a piece of work; None for one without examples."""
        fields = self.broker.hashes(self.broker.keys.item(item) for item in planned.items)
        return shard_works(planned, [int(known.get("tokens") or 1) for known in fields], now)


@dataclass(frozen=True, slots=True)
class Separate:
    """Requests in turn to the nodes that serve: which ones do is a matter of the settings, since only others train."""

    settings: ClusterSettings
    name: str = "separate"
    uses_state: bool = False

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        """The next one's turn."""
        del now
        ready = [node for node, is_open in enumerate(state.is_open_N.tolist()) if is_open]
        return Decision(node=place_item(self.settings, ready, work.number), reason="its turn")

    def resize(self, state: ClusterState, waiting: Sequence[Work], now: float) -> Resize:
        """All nodes are used."""
        del state, waiting, now
        return Resize()


def policy_of(settings: ClusterSettings, slo_s: float) -> Policy:
    """The policy that the settings name, for requests that are to end in so long."""
    if settings.policy == "separate":
        return Separate(settings)
    options = PolicyOptions(
        seed=settings.seed,
        training_rate=settings.training_share,
        prefer=cast("Preference", settings.prefer),
        slo_s=slo_s,
    )
    return make_policy(settings.policy, options)


def work_of(item: str, fields: Mapping[str, str], number: int) -> Work:
    """A request by its hash."""
    new_tokens = int(fields.get("max_new_tokens") or 0)
    tokens = int(fields.get("tokens") or 1) - new_tokens
    return Work(
        item=item,
        number=number,
        kind="generate" if fields["kind"] == "generate" else "score",
        lengths=(max(1, tokens),),
        arrived_at=float(fields.get("accepted_at") or 0),
        new_tokens=new_tokens,
    )


def shard_works(planned: PlannedStep, tokens: Sequence[int], now: float) -> list[Work | None]:
    """The virtual shards of a step as pieces of work, by the tokens of its examples; None where there is nothing."""
    lengths: list[list[int]] = [[] for _ in range(planned.num_shards)]
    for microbatch in planned.microbatches:
        of_shard = lengths[planned.shards[microbatch]]
        of_shard += [tokens[example] for example in planned.examples_of(microbatch)]
    return [
        Work(
            item=shard_name(planned.run, planned.step, shard),
            number=shard,
            kind="train",
            lengths=tuple(of_shard),
            arrived_at=now,
        )
        if of_shard
        else None
        for shard, of_shard in enumerate(lengths)
    ]
