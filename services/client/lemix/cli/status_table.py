"""`lemix status` for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_NONE = "–"


def status_tables(status: Mapping[str, Any]) -> list[Table]:
    """The cluster at a glance: itself, its stages, its workers, its queues."""
    return [
        _overview(status),
        _stages(status["nodes"]),
        _workers(status["workers"]),
        _queues(status["queues"]),
    ]


def _overview(status: Mapping[str, Any]) -> Table:
    names = ("cluster", "leader", "weights_version", "training_tax", "slo_attainment", "dead_letters")
    return _table("cluster", names, [[status.get(name) for name in names]])


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
    columns = ("worker", "pid", "device", "heartbeat_age_s")
    return _table("workers", columns, [[worker[name] for name in columns] for worker in workers])


def _queues(queues: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("depth", "pending", "oldest_age_s")
    rows = [[name, *(queue[column] for column in columns)] for name, queue in queues.items()]
    return _table("queues", ("queue", *columns), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*(column.replace("_", " ") for column in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row))
    return table


def _shown(value: object) -> str:
    if value is None or value in ("", {}):
        return _NONE
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _mebibytes(num_bytes: object) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if isinstance(num_bytes, int) else _NONE
