"""What the cluster is doing now: the object of `lemix status --json`, read from Redis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from lemix_common.broker import Broker
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.queues import Queue, read_queues
from lemix_common.store.versions import Versions

BUSY_WINDOW_S = 5.0
_EVENT_BATCHES = 200
_FAILURES = 10
"""The newest ones that a status names."""


class StageStatus(TypedDict):
    """One stage position of a node."""

    stage: int
    worker: str
    layers: list[int]
    weights_version: str | None
    training_step: int | None
    busy: dict[str, float]
    memory_used_bytes: int
    memory_budget_bytes: int


class NodeStatus(TypedDict):
    """One pipeline replica."""

    node: int
    state: str
    placement_epoch: int
    stages: list[StageStatus]


class WorkerStatus(TypedDict):
    """One worker process; its age is None once it is dead."""

    worker: str
    pid: int
    host: str
    device: str
    address: str
    heartbeat_age_s: float | None
    memory_used_bytes: int
    memory_limit_bytes: int
    links: dict[str, str]


class QueueStatus(TypedDict):
    """One queue: all entries, those taken and not done and by whom, the oldest one's age."""

    depth: int
    pending: int
    oldest_age_s: float
    held_by: dict[str, int]


class Failure(TypedDict):
    """An item that ended as failed."""

    item: str
    reason: str
    at: float


_DIVERGING = (
    "replicas are independent: nodes learn different models under one version's name, and answers come from the one "
    "that was published; for studies only"
)


_EMULATED = (
    "accelerators are emulated: nothing is computed, tokens, scores and losses are made up, and weights' hashes only "
    "tell versions apart"
)


class Status(TypedDict):
    """A cluster at a glance."""

    cluster: str
    state: str
    leader: str | None
    leader_epoch: int
    nodes: list[NodeStatus]
    workers: list[WorkerStatus]
    queues: dict[str, QueueStatus]
    dead_letters: int
    failures: list[Failure]
    training_tax: float
    slo_attainment: float | None
    """Of the requests that have ended; None while none has that had an objective (see `slo_s` and `lemix profile`)."""
    weights_version: str
    versions: dict[str, str]
    training: dict[str, int]
    warnings: list[str]
    """What a user of this cluster should know before relying on it."""
    training_refused: str
    """Why training stands still: the newest checkpoint can't be loaded."""
    totals: dict[str, float]
    metrics: dict[str, str]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a stage's time, as its worker reported it."""

    node: int
    stage: int
    cat: str
    start: float
    end: float


def read_status(broker: Broker) -> Status:
    """Read the whole; `ClusterError` if there is no cluster."""
    cluster, keys = Cluster(broker), broker.keys
    settings = cluster.settings()
    state, totals, run = broker.hashes([keys.cluster_state, keys.totals, keys.run(MAIN_RUN)])
    live = Versions(broker).live()
    workers = cluster.workers()
    busy = busy_shares(_recent_spans(broker), now=broker.clock.now(), window_s=BUSY_WINDOW_S)
    nodes = cluster.nodes(settings.nodes)
    leader, leader_epoch, letters, failures = _ask(
        broker,
        lambda pipe: (
            pipe.get(keys.leader),
            pipe.get(keys.leader_epoch),
            pipe.xlen(keys.dead_letters),
            pipe.xrevrange(keys.failures, count=_FAILURES),
        ),
    )
    return Status(
        cluster=keys.cluster,
        state=state.get("state", "unknown"),
        leader=leader,
        leader_epoch=int(leader_epoch or 0),
        nodes=[_node(number, fields, settings.stages, workers, busy) for number, fields in enumerate(nodes)],
        workers=_workers(broker, workers, settings.heartbeat_expiry_s),
        queues={name: _queue(queue) for name, queue in read_queues(broker, settings.nodes).items()},
        dead_letters=letters,
        failures=[
            Failure(item=fields["item"], reason=fields["reason"], at=float(fields["at"]))
            for _, fields in failures
        ],
        training_tax=training_tax(totals),
        slo_attainment=slo_attainment(totals),
        weights_version=live["served"],
        versions=live,
        training={
            name: int(run.get(name) or 0) for name in ("planned", "committed", "published", "checkpoint")
        },
        warnings=[
            *([_DIVERGING] if settings.replicas == "independent" else []),
            *([_EMULATED] if settings.emulated_profile else []),
        ],
        training_refused=run.get("refused", ""),
        totals={name: float(value) for name, value in totals.items()},
        metrics=cluster.metrics(),
    )


def can_serve(status: Status) -> bool:
    """Whether somebody leads and every stage of every node is ready on a worker that lives."""
    living = {worker["worker"] for worker in status["workers"] if worker["heartbeat_age_s"] is not None}
    hosts = {stage["worker"] for node in status["nodes"] for stage in node["stages"]}
    are_ready = all(node["state"] == "ready" for node in status["nodes"])
    return status["leader"] is not None and are_ready and hosts <= living


def training_tax(totals: Mapping[str, str | float]) -> float:
    """Σ time a ready step waited behind training ÷ Σ (response − that wait), of the items that ended."""
    blocked_s, response_s = float(totals.get("blocked_s", 0)), float(totals.get("response_s", 0))
    return blocked_s / (response_s - blocked_s) if response_s > blocked_s else 0.0


def slo_attainment(totals: Mapping[str, str | float]) -> float | None:
    """Of the requests that had an objective and ended, other than cancelled: the share that kept it."""
    counted = float(totals.get("slo_counted", 0))
    return float(totals.get("slo_kept", 0)) / counted if counted else None


def busy_shares(
    spans: Iterable[Span], *, now: float, window_s: float
) -> dict[tuple[int, int], dict[str, float]]:
    """For each (node, stage), the share of the last ``window_s`` it spent on each kind of work."""
    shares: dict[tuple[int, int], dict[str, float]] = {}
    for span in spans:
        inside_s = min(span.end, now) - max(span.start, now - window_s)
        if inside_s > 0:
            of_stage = shares.setdefault((span.node, span.stage), {})
            of_stage[span.cat] = of_stage.get(span.cat, 0.0) + inside_s / window_s
    return shares


def node_state(fields: Mapping[str, str], stages: int) -> str:
    """``ready`` when every stage reported for the current epoch, ``starting`` before, ``unplaced`` without workers."""
    if not all(fields.get(f"stage:{stage}") for stage in range(stages)):
        return "unplaced"
    is_ready = all(fields.get(f"ready:{stage}") == fields["epoch"] for stage in range(stages))
    return "ready" if is_ready else "starting"


def _node(
    number: int,
    fields: Mapping[str, str],
    stages: int,
    workers: Mapping[str, Mapping[str, str]],
    busy: Mapping[tuple[int, int], dict[str, float]],
) -> NodeStatus:
    epoch = fields.get("epoch", "0")

    def stage_status(stage: int) -> StageStatus:
        worker = fields.get(f"stage:{stage}", "")
        training = fields.get(f"training:{stage}")
        return StageStatus(
            stage=stage,
            worker=worker,
            layers=json.loads(fields.get(f"layers:{stage}") or "[]"),
            weights_version=fields.get(f"version:{stage}") or None,
            training_step=int(training) if training else None,
            busy=busy.get((number, stage), {}),
            memory_used_bytes=int(fields.get(f"memory:{stage}") or 0),
            memory_budget_bytes=int(workers.get(worker, {}).get("memory") or 0),
        )

    return NodeStatus(
        node=number,
        state=node_state(fields, stages),
        placement_epoch=int(epoch),
        stages=[stage_status(stage) for stage in range(stages)],
    )


def _workers(broker: Broker, workers: Mapping[str, Mapping[str, str]], expiry_s: float) -> list[WorkerStatus]:
    left_ms = _ask(broker, lambda pipe: [pipe.pttl(broker.keys.alive(name)) for name in workers])
    return [
        WorkerStatus(
            worker=name,
            pid=int(fields.get("pid") or 0),
            host=fields.get("host", ""),
            device=fields.get("device", ""),
            address=fields.get("address", ""),
            heartbeat_age_s=max(0.0, expiry_s - left / 1000) if left > 0 else None,
            memory_used_bytes=int(fields.get("memory_used") or 0),
            memory_limit_bytes=int(fields.get("memory") or 0),
            links=_links(fields.get("links", "")),
        )
        for (name, fields), left in zip(workers.items(), left_ms, strict=True)
    ]


def _links(text: str) -> dict[str, str]:
    """Peer to the way that tensors take to it."""
    return dict(part.split(" ", 1) for part in text.split(", ") if part)


def _queue(queue: Queue) -> QueueStatus:
    return QueueStatus(
        depth=queue.depth,
        pending=queue.pending,
        oldest_age_s=queue.oldest_age_s,
        held_by=dict(queue.held_by),
    )


def _recent_spans(broker: Broker) -> list[Span]:
    since = int(1000 * (broker.clock.now() - BUSY_WINDOW_S))
    (batches,) = _ask(
        broker, lambda pipe: [pipe.xrevrange(broker.keys.events, min=since, count=_EVENT_BATCHES)]
    )
    return [
        Span(int(span["node"]), int(span["stage"]), span["cat"], float(span["start"]), float(span["end"]))
        for _, fields in batches
        for span in json.loads(fields["spans"])
    ]


def _ask(broker: Broker, fill: Any) -> list[Any]:
    """Many questions in one round trip."""

    def ask() -> list[Any]:
        with broker.client.pipeline(transaction=False) as pipe:
            fill(pipe)
            return list(pipe.execute())

    return broker.again(ask)
