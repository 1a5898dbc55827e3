"""What the cluster is doing now: the object of `lemix status --json`, read from Redis."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from lemix_common.broker import Broker
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import COORDINATORS, STAGE_0
from lemix_common.store.versions import Versions

BUSY_WINDOW_S = 5.0
_EVENT_BATCHES = 200


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
    device: str
    heartbeat_age_s: float | None


class QueueStatus(TypedDict):
    """One queue: waiting entries, those taken and not done, the oldest one's age."""

    depth: int
    pending: int
    oldest_age_s: float


class Status(TypedDict):
    """A cluster at a glance."""

    cluster: str
    state: str
    leader: str | None
    nodes: list[NodeStatus]
    workers: list[WorkerStatus]
    queues: dict[str, QueueStatus]
    dead_letters: int
    training_tax: float
    slo_attainment: float | None
    weights_version: str
    versions: dict[str, str]
    training: dict[str, int]
    totals: dict[str, float]


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
    leader, letters = _ask(broker, lambda pipe: (pipe.get(keys.leader), pipe.xlen(keys.dead_letters)))
    return Status(
        cluster=keys.cluster,
        state=state.get("state", "unknown"),
        leader=leader,
        nodes=[
            _node(number, fields, settings.stages, live.get("served"), workers, busy)
            for number, fields in enumerate(nodes)
        ],
        workers=_workers(broker, workers, settings.heartbeat_expiry_s),
        queues=_queues(broker, settings.nodes),
        dead_letters=letters,
        training_tax=training_tax(totals),
        slo_attainment=None,
        weights_version=live["served"],
        versions=live,
        training={
            name: int(run.get(name) or 0) for name in ("planned", "committed", "published", "checkpoint")
        },
        totals={name: float(value) for name, value in totals.items()},
    )


def training_tax(totals: Mapping[str, str]) -> float:
    """Σ time a ready step waited behind training ÷ Σ (response − that wait), of the items that ended."""
    blocked_s, response_s = float(totals.get("blocked_s", 0)), float(totals.get("response_s", 0))
    return blocked_s / (response_s - blocked_s) if response_s > blocked_s else 0.0


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
    served: str | None,
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
            weights_version=served if fields.get(f"ready:{stage}") == epoch else None,
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
            device=fields.get("device", ""),
            heartbeat_age_s=max(0.0, expiry_s - left / 1000) if left > 0 else None,
        )
        for (name, fields), left in zip(workers.items(), left_ms, strict=True)
    ]


def _queues(broker: Broker, nodes: int) -> dict[str, QueueStatus]:
    """Inference items not dispatched, each node's dispatched ones, examples that no step has yet."""
    keys = broker.keys
    groups = {"submissions": (keys.submissions, COORDINATORS)}
    groups |= {f"work:{node}": (keys.work(node), STAGE_0) for node in range(nodes)}
    streams = {name: stream for name, (stream, _) in groups.items()} | {"examples": keys.examples(MAIN_RUN)}
    depths = _ask(broker, lambda pipe: [pipe.xlen(stream) for stream in streams.values()])
    oldest = _ask(broker, lambda pipe: [pipe.xrange(stream, count=1) for stream in streams.values()])
    pending = _ask(broker, lambda pipe: [pipe.xpending(*group) for group in groups.values()])
    now = broker.clock.now()
    counts = dict(zip(groups, (int(summary["pending"]) for summary in pending), strict=True))
    return {
        name: QueueStatus(
            depth=depth,
            pending=counts.get(name, 0),
            oldest_age_s=max(0.0, now - int(first[0][0].partition("-")[0]) / 1000) if first else 0.0,
        )
        for name, depth, first in zip(streams, depths, oldest, strict=True)
    }


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
