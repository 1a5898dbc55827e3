"""How much waits where: the cluster's queues as anyone can read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lemix_common.broker import Broker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.items import COORDINATORS, STAGE_0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """One queue at a moment."""

    depth: int
    """Entries, those that were taken and haven't ended too."""
    pending: int
    """Of these, entries that somebody has taken."""
    oldest_age_s: float
    held_by: Mapping[str, int] = field(default_factory=dict)
    """Who has taken how many (a node's stage 0 is called WORKER:EPOCH)."""


def read_queues(broker: Broker, nodes: int) -> dict[str, Queue]:
    """Inference items not dispatched, each node's dispatched ones, examples that no step has yet."""
    keys = broker.keys
    groups = {"submissions": (keys.submissions, COORDINATORS)}
    groups |= {f"work:{node}": (keys.work(node), STAGE_0) for node in range(nodes)}
    streams = {name: stream for name, (stream, _) in groups.items()} | {"examples": keys.examples(MAIN_RUN)}

    def ask() -> list[Any]:
        with broker.client.pipeline(transaction=False) as pipe:
            for stream in streams.values():
                pipe.xlen(stream)
                pipe.xrange(stream, count=1)
            for group in groups.values():
                pipe.xpending(*group)
            return list(pipe.execute())

    answers = broker.again(ask)
    depths, oldest = answers[: 2 * len(streams) : 2], answers[1 : 2 * len(streams) : 2]
    pending = dict(zip(groups, answers[2 * len(streams) :], strict=True))
    now = broker.clock.now()
    return {
        name: Queue(
            depth=depth,
            pending=int(pending[name]["pending"]) if name in pending else 0,
            oldest_age_s=max(0.0, now - _added_at(first[0][0])) if first else 0.0,
            held_by=_held(pending[name]) if name in pending else {},
        )
        for name, depth, first in zip(streams, depths, oldest, strict=True)
    }


def _added_at(entry_id: str) -> float:
    return int(entry_id.partition("-")[0]) / 1000


def _held(summary: Mapping[str, Any]) -> dict[str, int]:
    return {str(consumer["name"]): int(consumer["pending"]) for consumer in summary["consumers"] or ()}
