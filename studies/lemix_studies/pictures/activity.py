"""Runs seen closely: idleness by kind, which nodes hold weights when, and who waited for what on a timeline."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from lemix_studies.experiments.runners import CloseUp
from lemix_studies.intervals import Interval
from lemix_studies.pictures.colours import AMBER, BLUE, GREY, INK, ORCHID, RED
from lemix_studies.pictures.style import DPI, Format, house_style, rendered
from lemix_studies.pictures.timeline import timeline_figure
from lemix_studies.pieces import INFERENCE, TRAINING
from lemix_studies.timelines import chosen_window, extent

_WIDTH_IN = 9.0
_HALF_HEIGHT = 0.42
_SHARES = (
    ("inference", AMBER, INFERENCE),
    ("training", BLUE, TRAINING),
    ("pipeline idle: waiting for a neighbour", RED, ("idle_pipeline",)),
    ("serving idle: nothing to do", ORCHID, ("idle_serving",)),
)
_MOST_MARKS = 60


def idleness_picture(close_ups: Mapping[str, CloseUp], *, form: Format = "png") -> bytes:
    """A bar a policy: where the time of the stages went that held weights."""
    with house_style():
        figure = Figure(figsize=(_WIDTH_IN, 1.2 + 0.32 * len(close_ups)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for row, close_up in enumerate(close_ups.values()):
            left = 0.0
            for (_, colour, _), part in zip(_SHARES, shares_of_time(close_up), strict=True):
                axes.barh(
                    row,
                    part,
                    left=left,
                    color=colour,
                    height=0.72,
                    alpha=1 if colour in {AMBER, BLUE} else 0.45,
                )
                left += part
        axes.set_yticks(range(len(close_ups)), list(close_ups))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("of the stages' time on nodes that hold weights")
        axes.tick_params(axis="y", length=0)
        handles = [
            Patch(color=colour, alpha=1 if colour in {AMBER, BLUE} else 0.45, label=name)
            for name, colour, _ in _SHARES
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
        return rendered(figure, form)


def shares_of_time(close_up: CloseUp) -> list[float]:
    """Inference, training, pipeline and serving idleness, as parts of what was held; idleness elsewhere is left out."""
    stages = {stage for _, stage in close_up.recording.positions}
    held_s = sum(to - since for _, since, to in close_up.held) * len(stages)
    if held_s <= 0:
        return [0.0] * len(_SHARES)
    seconds = [
        sum(
            _overlap(close_up.held, piece.node, piece.start, piece.end)
            for piece in close_up.recording.pieces
            if piece.category in categories
        )
        for _, _, categories in _SHARES
    ]
    return [part / held_s for part in seconds]


def activity_picture(close_ups: Mapping[str, CloseUp], *, form: Format = "png") -> bytes:
    """A panel a policy, a row a node: when it held weights, and when a stage of it worked."""
    with house_style():
        nodes = max(node for one in close_ups.values() for node, _ in one.recording.positions) + 1
        height_in = 0.8 + len(close_ups) * (0.42 + 0.16 * nodes)
        figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        panels = figure.subplots(len(close_ups), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (label, close_up) in zip(panels, close_ups.items(), strict=True):
            _activity(panel, close_up, nodes)
            held_s = sum(to - since for _, since, to in close_up.held)
            panel.set_title(label, fontsize=9, fontweight="bold")
            panel.set_title(f"{held_s:.1f} node-seconds", loc="right", color=GREY, fontsize=8.5)
        panels[-1].set_xlabel("seconds since the first item")
        panels[-1].set_xlim(left=0)
        handles = [
            Patch(color=AMBER, alpha=0.25, label="holds weights"),
            Patch(color=INK, label="at least one stage works"),
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2)
        return rendered(figure, form)


def _activity(panel: Axes, close_up: CloseUp, nodes: int) -> None:
    held = [(node, since, to) for node, since, to in close_up.held]
    for node, since, to in held:
        panel.barh(node, to - since, left=since, height=0.84, color=AMBER, alpha=0.25, linewidth=0)
    work = [piece for piece in close_up.recording.pieces if not piece.is_idle]
    segments = [[(piece.start, piece.node), (piece.end, piece.node)] for piece in work]
    panel.add_collection(LineCollection(segments, colors=INK, linewidths=4, capstyle="butt"), autolim=False)
    panel.set_ylim(-0.6, nodes - 0.4)
    panel.set_yticks(range(nodes), [f"node {node}" if nodes <= 4 else str(node) for node in range(nodes)])
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def dependencies_picture(close_up: CloseUp, *, form: Format = "png") -> bytes:
    """A timeline in which forwards show what they waited for: the stage before (immediate) or a backward (far)."""
    window = _window(close_up)
    with house_style():
        figure, panels = timeline_figure(close_up.recording, window)
        for node, axes in panels.items():
            _mark(axes, close_up, node, window)
        handles = [
            Line2D(
                [], [], color=INK, marker="^", linestyle="none", markersize=5, label="immediate dependency"
            ),
            Line2D([], [], color=RED, linewidth=2.4, label="far dependency: a backward went first"),
        ]
        figure.legend(handles=handles, loc="lower right", ncols=2, fontsize=8, borderaxespad=0.2)
        return rendered(figure, form)


def _mark(axes: Axes, close_up: CloseUp, node: int, window: Interval) -> None:
    seen = [
        (stage, since, began)
        for at, stage, since, began in close_up.far
        if at == node and began >= window[0] and since <= window[1]
    ]
    for stage, since, began in seen:
        axes.plot(
            [max(since, window[0]), min(began, window[1])],
            [stage - _HALF_HEIGHT] * 2,
            color=RED,
            linewidth=2.4,
            zorder=5,
        )
    begun = [
        (stage, at)
        for where, stage, at in close_up.immediate
        if where == node and window[0] <= at <= window[1]
    ]
    if len(begun) <= _MOST_MARKS:
        for stage, at in begun:
            axes.plot(
                at, stage - _HALF_HEIGHT - 0.06, marker="^", color=INK, markersize=4, zorder=5, clip_on=False
            )


def _window(close_up: CloseUp) -> Interval:
    """A stretch that reads well, around a far dependency if there is one."""
    start, end = chosen_window(close_up.recording.pieces, None, None)
    if not close_up.far or any(start <= began <= end for _, _, _, began in close_up.far):
        return start, end
    _, last = extent(close_up.recording.pieces)
    half = (end - start) / 2
    middle = close_up.far[0][3]
    first = max(0.0, min(middle - half, last - 2 * half))
    return first, first + 2 * half


def _overlap(held: tuple[tuple[int, float, float], ...], node: int, start: float, end: float) -> float:
    return sum(max(0.0, min(end, to) - max(start, since)) for at, since, to in held if at == node)
