"""What a coordinator shows Prometheus: functions of what was read (see `figures`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lemix_common.metrics import (
    BLOCKED_TIME,
    ITEMS,
    ITEMS_OPEN,
    NODES,
    QUEUE_DEPTH,
    QUEUE_OLDEST,
    QUEUE_PENDING,
    RESPONSE_TIME,
    STEP_CHECKPOINTED,
    STEP_COMMITTED,
    STEP_PLANNED,
    STEP_PUBLISHED,
    TAX,
    WORKERS,
    Sample,
)
from lemix_common.store.queues import Queue
from lemix_common.store.training import RunState

STATES = ("submitted", "done", "failed", "cancelled", "refused", "dead_lettered")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFigures:
    """The cluster in numbers."""

    totals: Mapping[str, float]
    run: RunState
    queues: Mapping[str, Queue]
    nodes: Mapping[str, int]
    """State (ready, starting, unplaced) to the number of nodes in it."""
    workers_alive: int
    workers_silent: int


def cluster_samples(figures: ClusterFigures) -> Iterator[Sample]:
    """What the leader says of the whole cluster."""
    totals, run = figures.totals, figures.run
    yield from (Sample(ITEMS, totals.get(state, 0), (state,)) for state in STATES)
    yield Sample(ITEMS_OPEN, totals.get("open", 0))
    for name, queue in figures.queues.items():
        yield Sample(QUEUE_DEPTH, queue.depth, (name,))
        yield Sample(QUEUE_PENDING, queue.pending, (name,))
        yield Sample(QUEUE_OLDEST, queue.oldest_age_s, (name,))
    yield Sample(STEP_PLANNED, run.planned, (run.run,))
    yield Sample(STEP_COMMITTED, run.committed, (run.run,))
    yield Sample(STEP_PUBLISHED, run.published, (run.run,))
    yield Sample(STEP_CHECKPOINTED, run.checkpoint, (run.run,))
    yield Sample(TAX, totals.get("training_tax", 0))
    yield Sample(RESPONSE_TIME, totals.get("response_s", 0))
    yield Sample(BLOCKED_TIME, totals.get("blocked_s", 0))
    yield from (
        Sample(NODES, figures.nodes.get(state, 0), (state,)) for state in ("ready", "starting", "unplaced")
    )
    yield Sample(WORKERS, figures.workers_alive, ("alive",))
    yield Sample(WORKERS, figures.workers_silent, ("silent",))


def node_states(nodes: Iterable[tuple[bool, bool]]) -> Counter[str]:
    """How many nodes are in each state, of (has all its workers, is ready)."""
    return Counter(
        "ready" if is_ready else "starting" if is_placed else "unplaced" for is_placed, is_ready in nodes
    )
