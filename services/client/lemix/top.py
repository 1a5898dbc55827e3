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

COLOURS: Mapping[str, str] = {
    "decode": "#F0B429",
    "prefill": "#F7D88A",
    "training_forward": "#4C86CF",
    "training_backward": "#8CCFC0",
    "optimizer": "#A0A0A0",
}
"""Kinds of work, in the order of a bar. Like the timeline's, but visible on dark and on light terminals."""
_BAR_CELLS = 24
_FULL, _EMPTY = "█", "·"


@dataclass(frozen=True, slots=True)
class Sight:
    """A status and when it was read."""

    at: float
    status: Status


def frame(now: Sight, earlier: Sight | None = None, *, trouble: str = "") -> RenderableType:
    """One picture of the cluster; rates are over the time since ``earlier``."""
    parts: list[RenderableType] = [_head(now, earlier), _nodes(now.status["nodes"]), _queues(now.status)]
    if now.status["failures"]:
        parts.append(_failures(now.status))
    parts.append(_legend())
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    return Group(*parts)


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


def _head(now: Sight, earlier: Sight | None) -> Panel:
    status, totals = now.status, now.status["totals"]
    run, versions = status["training"], status["versions"]
    lines = [
        f"leader {status['leader'] or 'nobody'} (epoch {status['leader_epoch']})   "
        f"workers {sum(w['heartbeat_age_s'] is not None for w in status['workers'])} alive, "
        f"{sum(w['heartbeat_age_s'] is None for w in status['workers'])} silent",
        f"version {status['weights_version']} is served"
        + "".join(f", {versions[name]} {name}" for name in ("preparing", "draining") if versions.get(name)),
        f"steps {run['planned']} planned, {run['committed']} committed, {run['published']} published, "
        f"{run['checkpoint']} in a checkpoint",
        f"items {totals.get('done', 0):.0f} done{_rate(now, earlier)}, {totals.get('open', 0):.0f} open, "
        f"{totals.get('failed', 0):.0f} failed, {totals.get('cancelled', 0):.0f} cancelled, "
        f"{totals.get('refused', 0):.0f} refused, {status['dead_letters']} dead letters",
        f"training tax {status['training_tax']:.1%}{_tax_now(now, earlier)}",
    ]
    title = f"cluster {status['cluster']} · {status['state']}"
    return Panel(Text("\n".join(lines)), title=title, title_align="left", box=box.ROUNDED)


def _rate(now: Sight, earlier: Sight | None) -> str:
    if earlier is None or now.at <= earlier.at:
        return ""
    done = now.status["totals"].get("done", 0) - earlier.status["totals"].get("done", 0)
    return f" ({done / (now.at - earlier.at):.1f}/s)"


def _tax_now(now: Sight, earlier: Sight | None) -> str:
    if earlier is None:
        return " since the start"
    return f" since the start, {recent_tax(now.status['totals'], earlier.status['totals']):.1%} now"


def _nodes(nodes: Sequence[NodeStatus]) -> Table:
    """A row a node, a column a stage."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("node", no_wrap=True)
    stages = max((len(node["stages"]) for node in nodes), default=0)
    for stage in range(stages):
        table.add_column(f"stage {stage}", no_wrap=True)
    for node in nodes:
        state = Text(f"{node['node']} {node['state']}", style="" if node["state"] == "ready" else "yellow")
        state.append(f"\nepoch {node['placement_epoch']}", style="dim")
        table.add_row(state, *(_cell(stage) for stage in node["stages"]))
    return table


def _cell(stage: StageStatus) -> Text:
    busy = sum(stage["busy"].values())
    text = Text(stage["worker"] or "nobody")
    text.append("\n").append(bar(stage["busy"])).append(f" {busy:.0%}\n")
    layers = "–".join(str(layer) for layer in stage["layers"]) or "?"
    about = [
        f"version {stage['weights_version'] or '–'}",
        f"layers {layers}",
        f"{stage['memory_used_bytes'] / 2**20:.1f} MiB",
    ]
    return text.append(" · ".join(about), style="dim")


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


def _failures(status: Status) -> Text:
    newest = status["failures"][0]
    return Text(f"failed last: {newest['item']}: {newest['reason']}", style="red", no_wrap=True)


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
