"""What the processes show Prometheus, as a table of names; docs/metrics.md is drawn from it.

Figures about the whole cluster are shown by the leading coordinator alone, so that a sum over all processes counts
nothing twice. A process shows a metric as `Sample`s, made by pure functions of what it knows; `metrics_page` serves
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from lemix_common.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A name, who shows it, and what its value means."""

    name: str
    kind: Literal["counter", "gauge"]
    shown_by: Literal["the leader", "every coordinator", "workers", "operations", "every process"]
    meaning: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One value; ``labels`` are those of its metric, in their order."""

    metric: Metric
    value: float
    labels: tuple[object, ...] = ()


ITEMS: Final = Metric(
    name="lemix_items_total",
    kind="counter",
    shown_by="the leader",
    labels=("state",),
    meaning="Items that reached this state: submitted, done, failed, cancelled, refused or dead_lettered.",
)
ITEMS_OPEN: Final = Metric(
    name="lemix_items_open",
    kind="gauge",
    shown_by="the leader",
    meaning="Accepted items that have not ended.",
)
QUEUE_DEPTH: Final = Metric(
    name="lemix_queue_depth",
    kind="gauge",
    shown_by="the leader",
    labels=("queue",),
    meaning="Entries of a queue, taken ones that haven't ended too: submissions, work:NODE, examples.",
)
QUEUE_PENDING: Final = Metric(
    name="lemix_queue_pending",
    kind="gauge",
    shown_by="the leader",
    labels=("queue",),
    meaning="Entries of a queue that somebody has taken and not ended.",
)
QUEUE_OLDEST: Final = Metric(
    name="lemix_queue_oldest_age_seconds",
    kind="gauge",
    shown_by="the leader",
    labels=("queue",),
    meaning="How long ago a queue's oldest entry was added; 0 if it is empty.",
)
STEP_PLANNED: Final = Metric(
    name="lemix_step_planned",
    kind="gauge",
    shown_by="the leader",
    labels=("run",),
    meaning="The newest training step that is planned.",
)
STEP_COMMITTED: Final = Metric(
    name="lemix_step_committed",
    kind="gauge",
    shown_by="the leader",
    labels=("run",),
    meaning="The newest training step that is committed.",
)
STEP_PUBLISHED: Final = Metric(
    name="lemix_step_published",
    kind="gauge",
    shown_by="the leader",
    labels=("run",),
    meaning="The newest training step that the served weights contain.",
)
STEP_CHECKPOINTED: Final = Metric(
    name="lemix_step_checkpointed",
    kind="gauge",
    shown_by="the leader",
    labels=("run",),
    meaning="The newest training step that a durable checkpoint covers.",
)
TAX: Final = Metric(
    name="lemix_training_tax_ratio",
    kind="gauge",
    shown_by="the leader",
    meaning="What co-located training added to served requests' time, as a share of the rest of it, since the start.",
)
RESPONSE_TIME: Final = Metric(
    name="lemix_response_seconds_total",
    kind="counter",
    shown_by="the leader",
    meaning="Time from submission to end, over all requests that are done.",
)
BLOCKED_TIME: Final = Metric(
    name="lemix_training_blocked_seconds_total",
    kind="counter",
    shown_by="the leader",
    meaning="Time that ready steps of requests that are done waited behind training, over all stages.",
)
NODES: Final = Metric(
    name="lemix_nodes",
    kind="gauge",
    shown_by="the leader",
    labels=("state",),
    meaning="Nodes by state: ready, starting, unplaced.",
)
WORKERS: Final = Metric(
    name="lemix_workers",
    kind="gauge",
    shown_by="the leader",
    labels=("state",),
    meaning="Registered workers by state: alive or silent.",
)
LEADING: Final = Metric(
    name="lemix_coordinator_leading",
    kind="gauge",
    shown_by="every coordinator",
    meaning="1 for the coordinator that leads, 0 for one that stands by.",
)
BROKER_UP: Final = Metric(
    name="lemix_broker_up",
    kind="gauge",
    shown_by="every coordinator",
    meaning="1 if the broker answered while this was read.",
)
BUSY_TIME: Final = Metric(
    name="lemix_stage_busy_seconds_total",
    kind="counter",
    shown_by="workers",
    labels=("node", "stage", "kind"),
    meaning="Compute time by kind: decode, prefill, training_forward, training_backward, optimizer.",
)
STAGE_BLOCKED_TIME: Final = Metric(
    name="lemix_stage_blocked_seconds_total",
    kind="counter",
    shown_by="workers",
    labels=("node", "stage"),
    meaning="Time that ready serving steps waited behind training on this stage.",
)
STAGE_READY: Final = Metric(
    name="lemix_stage_ready",
    kind="gauge",
    shown_by="workers",
    labels=("node", "stage"),
    meaning="1 for a stage that this worker hosts and that can serve, 0 while it gets ready.",
)
STAGE_WEIGHTS: Final = Metric(
    name="lemix_stage_weights_bytes",
    kind="gauge",
    shown_by="workers",
    labels=("node", "stage"),
    meaning="Memory of all weight versions that the stage holds.",
)
KV_BLOCKS: Final = Metric(
    name="lemix_kv_blocks",
    kind="gauge",
    shown_by="workers",
    labels=("node", "state"),
    meaning="Blocks of keys and values on each stage of a node whose stage 0 is here: owned by requests, or free.",
)
NODE_REQUESTS: Final = Metric(
    name="lemix_node_requests",
    kind="gauge",
    shown_by="workers",
    labels=("node", "state"),
    meaning="Requests of a node whose stage 0 is here: running (they own blocks), or waiting for blocks.",
)
PREEMPTIONS: Final = Metric(
    name="lemix_preemptions_total",
    kind="counter",
    shown_by="workers",
    labels=("node",),
    meaning="Times a request of this node gave its blocks up to an earlier one, and was computed again.",
)
READY_STEPS: Final = Metric(
    name="lemix_worker_ready_steps",
    kind="gauge",
    shown_by="workers",
    meaning="Pieces of compute that could run and wait for their turn.",
)
LONGEST_STEP: Final = Metric(
    name="lemix_worker_longest_step_seconds",
    kind="gauge",
    shown_by="workers",
    meaning="The longest piece of compute since the worker started: what a request may have to wait for.",
)
TRANSITIONS: Final = Metric(
    name="lemix_operation_transitions_total",
    kind="counter",
    shown_by="operations",
    labels=("outcome",),
    meaning="Transitions of operations (checkpoint, publish …) that were made, or failed and are asked for again.",
)
OUTAGES: Final = Metric(
    name="lemix_broker_outages_total",
    kind="counter",
    shown_by="every process",
    meaning="Times this process found the broker away.",
)
BUILD: Final = Metric(
    name="lemix_build_info",
    kind="gauge",
    shown_by="every process",
    labels=("version", "role"),
    meaning="Always 1; LeMix's version, and what the process is: coordinator, operations or worker.",
)

METRICS: Final = (
    ITEMS,
    ITEMS_OPEN,
    QUEUE_DEPTH,
    QUEUE_PENDING,
    QUEUE_OLDEST,
    STEP_PLANNED,
    STEP_COMMITTED,
    STEP_PUBLISHED,
    STEP_CHECKPOINTED,
    TAX,
    RESPONSE_TIME,
    BLOCKED_TIME,
    NODES,
    WORKERS,
    LEADING,
    BROKER_UP,
    BUSY_TIME,
    STAGE_BLOCKED_TIME,
    STAGE_READY,
    STAGE_WEIGHTS,
    KV_BLOCKS,
    NODE_REQUESTS,
    PREEMPTIONS,
    READY_STEPS,
    LONGEST_STEP,
    TRANSITIONS,
    OUTAGES,
    BUILD,
)
"""All of them, in the order in which a page explains them."""

HOST_VARIABLE = "LEMIX_METRICS_HOST"
PORT_VARIABLE = "LEMIX_METRICS_PORT"
THIS_MACHINE = "127.0.0.1"
_LARGEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where a process shows its metrics; port 0 is any free one."""

    host: str = THIS_MACHINE
    port: int = 0


def metrics_address(environment: Mapping[str, str]) -> MetricsAddress:
    """As the environment says; this machine only, unless it says more."""
    text = environment.get(PORT_VARIABLE) or "0"
    if not text.isdecimal() or int(text) > _LARGEST_PORT:
        raise SettingsError(f"{PORT_VARIABLE} = {text}: must be a port, 0 to {_LARGEST_PORT}")
    return MetricsAddress(environment.get(HOST_VARIABLE) or THIS_MACHINE, int(text))
