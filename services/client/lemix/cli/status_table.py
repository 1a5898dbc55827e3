"""`lemix status` and `lemix item` for a reader; narrow enough for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lemix.status import Failure, NodeStatus, QueueStatus, Status, WorkerStatus
from lemix.top import SERVING, TRAINING, summary

_NONE = "–"


def status_tables(status: Status) -> Iterator[RenderableType]:
    """The cluster at a glance: itself, its stages, its workers, its queues, what failed, where metrics are."""
    yield Text("\n".join([f"cluster {status['cluster']}, {status['state']}", *summary(status), ""]))
    yield _stages(status["nodes"])
    yield _workers(status["workers"])
    yield _queues(status["queues"])
    if status["failures"]:
        yield _failures(status["failures"])
    if status["metrics"]:
        yield _table(("process", "metrics"), list(status["metrics"].items()))


def item_table(item: str, fields: Mapping[str, str]) -> Table:
    """All that is known of an item, a line a field; moments in UTC."""
    rows = [[name, _moment(value) if name.endswith("_at") else value] for name, value in fields.items()]
    return _table(("item", item), rows)


def versions_table(versions: Sequence[Mapping[str, str]]) -> Table:
    """Versions, a line each, newest first."""
    columns = "version parent step examples loss sha256 published_at verdict checkpoint".split()
    if any(version.get("held_out_loss") for version in versions):
        columns.insert(-2, "held_out_loss")
    rows = [[_brief(name, version.get(name, _NONE)) for name in columns] for version in versions]
    return _table(columns, rows)


def _brief(name: str, value: str) -> str:
    if name.endswith("_at"):
        return _moment(value)
    if name == "checkpoint":
        return "yes" if value else ""
    if name.endswith("loss") and value not in {"", _NONE}:
        return f"{float(value):.4f}"
    return value[:12] if name == "sha256" else value


def _stages(nodes: Sequence[NodeStatus]) -> Table:
    rows = [
        [
            node["node"],
            node["state"],
            stage["stage"],
            stage["worker"],
            "–".join(str(layer) for layer in stage["layers"]),
            stage["weights_version"],
            _share(stage["busy"], SERVING),
            _share(stage["busy"], TRAINING),
        ]
        for node in nodes
        for stage in node["stages"]
    ]
    return _table(("node", "state", "stage", "worker", "layers", "version", "serving", "training"), rows)


def _workers(workers: Sequence[WorkerStatus]) -> Table:
    rows = [
        [
            worker["worker"],
            worker["host"],
            worker["pid"],
            worker["device"],
            _silent(worker["heartbeat_age_s"]),
            f"{worker['memory_used_bytes'] / 2**20:.0f} of {worker['memory_limit_bytes'] / 2**20:.0f} MiB",
            ", ".join(sorted(set(worker["links"].values()))),
        ]
        for worker in workers
    ]
    return _table(("worker", "host", "pid", "device", "heartbeat", "memory", "sends by"), rows)


def _queues(queues: Mapping[str, QueueStatus]) -> Table:
    rows = [
        [name, queue["depth"], queue["pending"], f"{queue['oldest_age_s']:.1f} s", _holders(queue["held_by"])]
        for name, queue in queues.items()
    ]
    return _table(("queue", "entries", "taken", "oldest", "taken by"), rows)


def _failures(failures: Sequence[Failure]) -> Table:
    rows = [[failure["item"], _moment(failure["at"]), failure["reason"]] for failure in failures]
    return _table(("failed last", "at", "reason"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in table.columns:
        column.overflow = "fold"  # a name is never cut: it is there to be copied
    for row in rows:
        table.add_row(*(_NONE if value in {None, ""} else str(value) for value in row))
    return table


def _share(busy: Mapping[str, float], kinds: Collection[str]) -> str:
    return f"{sum(share for kind, share in busy.items() if kind in kinds):.0%}"


def _silent(heartbeat_age_s: float | None) -> str:
    return "silent" if heartbeat_age_s is None else f"{heartbeat_age_s:.1f} s ago"


def _holders(held_by: Mapping[str, int]) -> str:
    return ", ".join(f"{holder} {count}" for holder, count in held_by.items())


def _moment(seconds: str | float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
