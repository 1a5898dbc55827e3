"""`lemix status` and `lemix item` for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

_NONE = "–"


def status_tables(status: Mapping[str, Any]) -> list[Table]:
    """The cluster at a glance: itself, its stages, its workers, its queues, what failed, where metrics are."""
    return [
        _overview(status),
        _training(status),
        _stages(status["nodes"]),
        _workers(status["workers"]),
        _queues(status["queues"]),
        *([_failures(status["failures"])] if status["failures"] else []),
        *([_metrics(status["metrics"])] if status["metrics"] else []),
    ]


def item_table(item: str, fields: Mapping[str, str]) -> Table:
    """All that is known of an item, a line a field; moments as the time of day (UTC)."""
    rows = [[name, _moment(value) if name.endswith("_at") else value] for name, value in fields.items()]
    return _table(f"item {item}", ("field", "value"), rows)


def _overview(status: Mapping[str, Any]) -> Table:
    names = ("cluster", "leader", "leader_epoch", "weights_version", "slo_attainment", "dead_letters")
    tax = f"{status['training_tax']:.1%}"
    return _table("cluster", (*names, "training_tax"), [[*(status.get(name) for name in names), tax]])


def _training(status: Mapping[str, Any]) -> Table:
    steps, versions = status["training"], status["versions"]
    columns = [*(f"step_{name}" for name in steps), *(f"version_{name}" for name in versions)]
    return _table("training", columns, [[*steps.values(), *versions.values()]])


def _stages(nodes: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("node", "state", "stage", "worker", "layers", "version", "busy", "memory")
    rows = [
        [
            node["node"],
            node["state"],
            stage["stage"],
            stage["worker"],
            "–".join(str(layer) for layer in stage["layers"] or ()),
            stage["weights_version"],
            ", ".join(f"{kind} {share:.0%}" for kind, share in (stage["busy"] or {}).items()),
            _mebibytes(stage["memory_used_bytes"]),
        ]
        for node in nodes
        for stage in node["stages"]
    ]
    return _table("stages", columns, rows)


def _workers(workers: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("worker", "host", "pid", "device", "heartbeat_age_s", "memory_used", "memory_limit", "address")
    rows = [
        [
            *(worker[name] for name in columns[:5]),
            _mebibytes(worker["memory_used_bytes"]),
            _mebibytes(worker["memory_limit_bytes"]),
            worker["address"],
        ]
        for worker in workers
    ]
    return _table("workers", columns, rows)


def _queues(queues: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("depth", "pending", "oldest_age_s")
    rows = [
        [name, *(queue[column] for column in columns), _holders(queue["held_by"])]
        for name, queue in queues.items()
    ]
    return _table("queues", ("queue", *columns, "held_by"), rows)


def _failures(failures: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[failure["item"], _moment(failure["at"]), failure["reason"]] for failure in failures]
    return _table("failed last", ("item", "at", "reason"), rows)


def _metrics(pages: Mapping[str, str]) -> Table:
    return _table("metrics", ("process", "page"), list(pages.items()))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*(column.replace("_", " ") for column in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row))
    return table


def _shown(value: object) -> str:
    if value is None or value in ("", {}):
        return _NONE
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _holders(held_by: Mapping[str, int]) -> str:
    return ", ".join(f"{holder} {count}" for holder, count in held_by.items())


def _moment(seconds: str | float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _mebibytes(num_bytes: object) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if isinstance(num_bytes, int) else _NONE
