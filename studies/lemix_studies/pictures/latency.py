"""What requests waited for: each time over the run, and its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lemix_studies.curves import LatencyCurve, binned
from lemix_studies.measures import percentile
from lemix_studies.pictures.colours import AMBER, BLUE, GREY, INK
from lemix_studies.pictures.style import DPI, Format, house_style, light_grid, rendered
from lemix_studies.wording import duration

_WIDTH_IN, _ROW_IN = 9.0, 2.1
_FEWEST_BARS, _MOST_BARS = 15, 60
_SLO_FACTOR = 5
_LABEL_HEIGHT = 0.09
"""Of a row's height."""


def latency_picture(curves: Sequence[LatencyCurve], *, title: str = "", form: Format = "png") -> bytes:
    """The bytes of a picture with a row for each of the times."""
    with house_style():
        figure = Figure(
            figsize=(_WIDTH_IN, 0.7 + _ROW_IN * max(1, len(curves))), dpi=DPI, layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if not curves:
            figure.text(0.5, 0.5, "no request was answered", color=GREY, ha="center")
            return rendered(figure, form)
        rows = figure.subplots(
            len(curves), 2, sharex="col", sharey="row", squeeze=False, width_ratios=[3.4, 1]
        )
        for (over_time, distribution), curve in zip(rows, curves, strict=True):
            _over_time(over_time, curve)
            _distribution(distribution, curve)
        labelled = {
            label: handle
            for axes in rows[:, 0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper right", ncols=len(labelled))
        rows[-1][0].set_xlim(left=0)
        rows[-1][0].set_xlabel("seconds since the first submission")
        rows[-1][1].set_xlabel("how often")
        return rendered(figure, form)


def _over_time(axes: Axes, curve: LatencyCurve) -> None:
    light_grid(axes)
    axes.set_ylabel(curve.name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.yaxis.set_minor_locator(NullLocator())
    size = 3.5 if len(curve.points) < 1000 else 1.8
    axes.plot(
        *zip(*curve.points, strict=True),
        "o",
        color=AMBER,
        markersize=size,
        alpha=0.5,
        markeredgewidth=0,
        label="each",
    )
    if bins := binned(curve.points):
        axes.plot([one.t for one in bins], [one.p50 for one in bins], color=INK, linewidth=1.6, label="p50")
        axes.plot([one.t for one in bins], [one.p95 for one in bins], color=BLUE, linewidth=1.6, label="p95")
    if curve.idle_s:
        axes.axhline(
            _SLO_FACTOR * curve.idle_s,
            color=GREY,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label=f"{_SLO_FACTOR} × idle",
        )


def _distribution(axes: Axes, curve: LatencyCurve) -> None:
    values = sorted(value for _, value in curve.points)
    low, high = max(values[0], 1e-6), max(values[-1], 2e-6)
    num_bars = min(_MOST_BARS, _FEWEST_BARS + len(values) // 10)
    edges = [low * (high / low) ** (number / num_bars) for number in range(num_bars + 1)]
    axes.hist(
        values,
        bins=edges,
        orientation="horizontal",
        color=AMBER,
        alpha=0.8,
        weights=[1 / len(values)] * len(values),
    )
    axes.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)
    chosen = {percent: max(percentile(values, percent), 1e-6) for percent in (50, 95, 99)}
    bottom, top = (log(limit) for limit in axes.get_ylim())
    heights = spread([(log(value) - bottom) / (top - bottom) for value in chosen.values()], _LABEL_HEIGHT)
    for (percent, value), height, colour in zip(chosen.items(), heights, (INK, BLUE, GREY), strict=True):
        axes.axhline(value, color=colour, linewidth=1.2)
        axes.annotate(
            f"p{percent}  {duration(value)}",
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=colour,
        )


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights, moved up where they are closer than ``least`` to the one below."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + least) if moved else height)
    return moved
