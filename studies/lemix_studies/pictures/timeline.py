"""The timeline: one row a stage, stage 0 at the bottom, grouped by node; who computes what, and who waits for what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lemix_studies.intervals import Interval
from lemix_studies.pictures.colours import FILLS, GREY, INK, OUTLINES
from lemix_studies.pictures.style import DPI, Format, house_style, rendered
from lemix_studies.pieces import Piece
from lemix_studies.recordings import Recording
from lemix_studies.timelines import item_numbers, role_of, shares_of

Rectangle = tuple[tuple[float, float], ...]

MOST_NODES = 8
_WIDTH_IN, _ROW_IN = 12.0, 0.34
_LEFT_IN, _RIGHT_IN, _TOP_IN, _BETWEEN_IN, _BOTTOM_IN = 0.72, 0.28, 0.82, 0.44, 0.55
_POINTS = 72 * (_WIDTH_IN - _LEFT_IN - _RIGHT_IN)
"""The width of a window on paper."""
_HALF_HEIGHT = 0.42
"""Of a box, where rows are 1 apart."""
_EDGED_POINTS = 4.0
_OUTLINED_POINTS = 8.0
"""Narrower boxes, of work and of idleness, have no edge: they would be nothing else."""
_LABEL_SIZE = 7.5
_CHARACTER_POINTS = 5.4
_LEGEND = {
    "decode": "inference",
    "training_forward": "training, forward",
    "training_backward": "training, backward",
    "optimizer": "optimizer",
    "idle_serving": "serving idle: nothing to do",
    "idle_pipeline": "pipeline idle: waiting for a neighbour",
}


def timeline_picture(recording: Recording, window: Interval, *, form: Format = "png") -> bytes:
    """The bytes of a picture of the recording's stages in a window of time."""
    with house_style():
        figure, _ = timeline_figure(recording, window)
        return rendered(figure, form)


def timeline_figure(recording: Recording, window: Interval) -> tuple[Figure, dict[int, Axes]]:
    """The same to draw more upon, in house style: the figure, and each node's axes, where stages are rows from 0."""
    stages_of: dict[int, list[int]] = {}
    for node, stage in recording.positions:
        stages_of.setdefault(node, []).append(stage)
    nodes, title = list(stages_of)[:MOST_NODES], recording.title
    if len(nodes) < len(stages_of):
        title = f"{title} · {len(nodes)} of {len(stages_of)} nodes".removeprefix(" · ")
    shown = [piece for piece in recording.pieces if piece.start < window[1] and piece.end > window[0]]
    names = item_numbers(shown)
    figure, panels = _panels([len(stages_of[node]) for node in nodes])
    for node, axes in zip(nodes, panels, strict=True):
        stages = stages_of[node]
        seen = [piece for piece in shown if piece.node == node]
        role = role_of(piece for piece in recording.pieces if piece.node == node)
        _frame(axes, stages, window, is_last=axes is panels[-1])
        _name(axes, f"node {node}", role, _in_words(shares_of(seen, window, len(stages))))
        _draw(axes, seen, stages, window, names)
    panels[-1].set_xlabel(recording.clock)
    _legend(figure, title)
    return figure, dict(zip(nodes, panels, strict=True))


def _panels(nums_rows: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a node, each as high as its rows need."""
    between_in = _BETWEEN_IN * (len(nums_rows) - 1)
    height_in = _TOP_IN + sum(nums_rows) * _ROW_IN + between_in + _BOTTOM_IN
    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=DPI)
    panels, top_in = [], height_in - _TOP_IN
    for num_rows in nums_rows:
        bottom_in = top_in - num_rows * _ROW_IN
        panels.append(
            figure.add_axes(
                (
                    _LEFT_IN / _WIDTH_IN,
                    bottom_in / height_in,
                    1 - (_LEFT_IN + _RIGHT_IN) / _WIDTH_IN,
                    num_rows * _ROW_IN / height_in,
                )
            )
        )
        top_in = bottom_in - _BETWEEN_IN
    return figure, panels


def _frame(axes: Axes, stages: Sequence[int], window: Interval, *, is_last: bool) -> None:
    axes.set_xlim(window)
    axes.set_ylim(-0.55, len(stages) - 0.45)
    axes.set_yticks(range(len(stages)), [f"stage {stage}" for stage in stages])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", length=3, labelbottom=is_last)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]))
    axes.spines["left"].set_visible(False)


def _name(axes: Axes, node: str, role: str, shares: str) -> None:
    def write(text: str, right_points: float, **look: Any) -> None:
        axes.annotate(
            text,
            (0.0, 1.0),
            xytext=(right_points, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            **look,
        )

    write(node, 0, fontweight="bold", fontsize=10)
    write(role, 7.2 * len(node), color=GREY)
    write(shares, _POINTS, color=GREY, ha="right", fontsize=8)


def _in_words(shares: Mapping[str, float]) -> str:
    idle = {category: shares.get(category, 0.0) for category in OUTLINES}
    busy = sum(shares.values()) - sum(idle.values())
    return f"busy {busy:.0%} · serving idle {idle['idle_serving']:.0%} · pipeline idle {idle['idle_pipeline']:.0%}"


def _draw(
    axes: Axes, pieces: Iterable[Piece], stages: Sequence[int], window: Interval, names: Mapping[str, str]
) -> None:
    points_per_second = _POINTS / (window[1] - window[0])
    looks: defaultdict[tuple[str, bool], list[Rectangle]] = defaultdict(list)
    for piece in pieces:
        row, start, end = stages.index(piece.stage), max(piece.start, window[0]), min(piece.end, window[1])
        width_points = (end - start) * points_per_second
        is_wide = width_points >= (_OUTLINED_POINTS if piece.is_idle else _EDGED_POINTS)
        inset_s = (0.9 if piece.is_idle and is_wide else 0.0) / points_per_second
        looks[piece.category, is_wide].append(_rectangle(row, start + inset_s, end - inset_s))
        label = _label_of(piece, names)
        if label and width_points >= len(label) * _CHARACTER_POINTS + 3:
            _label(axes, label, (start + end) / 2, row, FILLS[piece.category])
    for (category, is_wide), rectangles in looks.items():
        axes.add_collection(PolyCollection(rectangles, **_look(category, is_wide=is_wide)), autolim=False)


def _label_of(piece: Piece, names: Mapping[str, str]) -> str:
    """An item's number, and for how many others a box is."""
    if piece.category == "optimizer":
        return ""
    num_others = len(piece.others) + piece.more
    return names.get(piece.item, "") + (f" +{num_others}" if num_others else "")


def _rectangle(row: int, start: float, end: float) -> Rectangle:
    low, high = row - _HALF_HEIGHT, row + _HALF_HEIGHT
    return (start, low), (start, high), (end, high), (end, low)


def _look(category: str, *, is_wide: bool) -> dict[str, Any]:
    if category in OUTLINES:
        return {
            "facecolor": to_rgba(OUTLINES[category], 0.06 if is_wide else 0.2),
            "edgecolor": OUTLINES[category] if is_wide else "none",
            "linewidth": 1.1,
            "joinstyle": "miter",
            "zorder": 1,
        }
    return {
        "facecolor": FILLS[category],
        "edgecolor": INK if is_wide else "none",
        "linewidth": 0.5,
        "joinstyle": "miter",
        "zorder": 2,
    }


def _label(axes: Axes, label: str, middle: float, row: int, fill: str) -> None:
    axes.text(
        middle,
        row - 0.03,
        label,
        ha="center",
        va="center",
        fontsize=_LABEL_SIZE,
        fontweight="bold",
        color=_ink_on(fill),
        zorder=3,
        clip_on=True,
    )


def _ink_on(fill: str) -> str:
    red, green, blue, _ = to_rgba(fill)
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _legend(figure: Figure, title: str) -> None:
    height_in = figure.get_figheight()
    if title:
        figure.text(
            _LEFT_IN / _WIDTH_IN,
            1 - 0.12 / height_in,
            title,
            ha="left",
            va="top",
            fontsize=11,
            fontweight="bold",
        )
    handles = [Patch(label=label, **_look(category, is_wide=True)) for category, label in _LEGEND.items()]
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=len(handles),
        bbox_to_anchor=(_LEFT_IN / _WIDTH_IN, 1 - (0.34 if title else 0.1) / height_in),
        borderaxespad=0,
        borderpad=0,
        handlelength=1.7,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.6,
    )
