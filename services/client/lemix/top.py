"""`lemix top` as values: a status, and the one before it, become what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lemix.status import NodeStatus, StageStatus, Status, training_tax

SERVING: Mapping[str, str] = {"decode": "#F0B429", "prefill": "#F7D88A"}
TRAINING: Mapping[str, str] = {
    "training_forward": "#4C86CF",
    "training_backward": "#8CCFC0",
    "optimizer": "#A0A0A0",
}
COLOURS: Mapping[str, str] = {**SERVING, **TRAINING}
"""Kinds of work, in the order of a bar. Like the timeline's, but visible on dark and on light terminals."""
_BAR_CELLS = 24
_NODE_CELLS, _LEAST_CELLS = 12, 22
"""Columns of the terminal that a node's name needs, and at least a stage."""
_FULL, _EMPTY = "█", "·"


@dataclass(frozen=True, slots=True)
class Sight:
    """A status and when it was read."""

    at: float
    status: Status


def frame(now: Sight, earlier: Sight | None = None, *, width: int = 80, trouble: str = "") -> RenderableType:
    """One picture of the cluster; rates are over the time since ``earlier``."""
    status = now.status
    about = Text("\n".join(summary(status, _since(now, earlier))))
    title = f"cluster {status['cluster']}, {status['state']}"
    parts: list[RenderableType] = [
        Panel(about, title=title, title_align="left", box=box.ROUNDED),
        _nodes(status["nodes"], width),
        _queues(status),
    ]
    if status["failures"]:
        newest = status["failures"][0]
        parts.append(Text(f"failed last: {newest['item']}: {newest['reason']}", style="red", no_wrap=True))
    parts.append(_legend())
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class Lately:
    """What happened between two sights."""

    done_per_s: float
    training_tax: float


def summary(status: Status, lately: Lately | None = None) -> list[str]:
    """A cluster in six lines, and one more where training can't go on."""
    totals, run, versions = status["totals"], status["training"], status["versions"]
    alive = sum(worker["heartbeat_age_s"] is not None for worker in status["workers"])
    other = [f", {versions[name]} is {name}" for name in ("preparing", "draining") if versions.get(name)]
    counts = [f"{totals.get(name, 0):.0f} {name}" for name in ("open", "failed", "cancelled", "refused")]
    rate = f" ({lately.done_per_s:.1f}/s)" if lately else ""
    letters = f"{status['dead_letters']} dead letters"
    tax_now = f", {lately.training_tax:.1%} now" if lately else ""
    return [
        f"leader   {status['leader'] or 'nobody'}, epoch {status['leader_epoch']}",
        f"workers  {alive} alive, {len(status['workers']) - alive} silent",
        f"version  {status['weights_version']} is served{''.join(other)}",
        f"steps    {', '.join(f'{step} {name}' for name, step in run.items())}",
        f"items    {totals.get('done', 0):.0f} done{rate}, {', '.join(counts)}, {letters}",
        f"tax      {status['training_tax']:.1%} since the start{tax_now}",
        *(f"warning: {warning}" for warning in status["warnings"]),
        *([f"training stands still: {refused}"] if (refused := status["training_refused"]) else []),
    ]


def bar(busy: Mapping[str, float], cells: int = _BAR_CELLS) -> Text:
    """The share of each kind of work as coloured cells; what is left is idle."""
    text, end = Text(), 0.0
    for kind in [kind for kind in COLOURS if kind in busy]:
        begin, end = end, min(1.0, end + busy[kind])
        text.append(_FULL * (round(end * cells) - round(begin * cells)), style=COLOURS[kind])
    text.append(_EMPTY * (cells - round(end * cells)), style="dim")
    return text


def recent_tax(now: Mapping[str, float], earlier: Mapping[str, float]) -> float:
    """The training tax of the time between two readings of the totals."""
    sums = ("blocked_s", "response_s")
    return training_tax({name: now.get(name, 0.0) - earlier.get(name, 0.0) for name in sums})


def _since(now: Sight, earlier: Sight | None) -> Lately | None:
    if earlier is None or now.at <= earlier.at:
        return None
    totals, before = now.status["totals"], earlier.status["totals"]
    done = totals.get("done", 0.0) - before.get("done", 0.0)
    return Lately(done / (now.at - earlier.at), recent_tax(totals, before))


def _nodes(nodes: Sequence[NodeStatus], width: int) -> Table:
    """A row a node, a column a stage; a node with more stages than fit goes on in the next row."""
    stages = max((len(node["stages"]) for node in nodes), default=1)
    columns = max(1, min(stages, (width - _NODE_CELLS) // _LEAST_CELLS))
    cells = min(_BAR_CELLS, (width - _NODE_CELLS) // columns - len(" 100 %   "))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("node", min_width=_NODE_CELLS - 2, no_wrap=True)
    for _ in range(columns):
        table.add_column("stage", no_wrap=True)
    for node in nodes:
        label = Text(f"{node['node']} {node['state']}", style="" if node["state"] == "ready" else "yellow")
        label.append(f"\nepoch {node['placement_epoch']}", style="dim")
        for first in range(0, len(node["stages"]), columns):
            row = node["stages"][first : first + columns]
            table.add_row(label if first == 0 else "", *(_cell(stage, cells) for stage in row))
    return table


def _cell(stage: StageStatus, cells: int) -> Text:
    text = Text(f"{stage['stage']} {stage['worker'] or 'nobody'}\n")
    text.append(bar(stage["busy"], cells)).append(f" {sum(stage['busy'].values()):.0%}\n")
    layers = "–".join(str(layer) for layer in stage["layers"]) or "?"
    about = f"{stage['weights_version'] or 'no version'}, layers {layers}"
    return text.append(about, style="dim")


def _queues(status: Status) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("queue", "entries", "taken", "oldest", "taken by"):
        table.add_column(name, justify="right" if name in {"entries", "taken", "oldest"} else "left")
    for name, queue in status["queues"].items():
        held = ", ".join(f"{who} {count}" for who, count in queue["held_by"].items())
        table.add_row(
            name, str(queue["depth"]), str(queue["pending"]), f"{queue['oldest_age_s']:.1f} s", held or "–"
        )
    return table


def _legend() -> Text:
    text = Text()
    for part in _legend_parts():
        text.append(part)
    return text.append("   q or Ctrl-C ends", style="dim")


def _legend_parts() -> Iterator[Text]:
    for kind, colour in COLOURS.items():
        yield Text(_FULL, style=colour)
        yield Text(f" {kind.replace('_', ' ')}  ")
    yield Text(f"{_EMPTY} idle", style="dim")
