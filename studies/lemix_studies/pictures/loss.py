"""What training and serving made of the text, over the time of a run and the versions it served."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lemix_studies.curves import LossCurves, Point, running_mean
from lemix_studies.pictures.colours import AMBER, BLUE, GREY, INK
from lemix_studies.pictures.style import DPI, Format, house_style, light_grid, rendered

_WIDTH_IN, _LOSS_IN, _MATCH_IN = 9.0, 3.4, 1.7
_MOST_VERSIONS = 8


def loss_picture(curves: LossCurves, *, title: str = "", form: Format = "png") -> bytes:
    """The bytes of a picture: losses, and where generations were compared with a text, how many matched."""
    has_matches = any(value for _, value in curves.matches)
    heights = [_LOSS_IN, _MATCH_IN] if has_matches else [_LOSS_IN]
    with house_style():
        figure = Figure(figsize=(_WIDTH_IN, sum(heights)), dpi=DPI, layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        _losses(panels[0], curves)
        if curves.steps or curves.scores:
            figure.legend(loc="outside upper right", ncols=2)
        _versions(panels[0], curves.versions)
        if has_matches:
            _matches(panels[1], curves.matches)
        panels[-1].set_xlim(left=0)
        panels[-1].set_xlabel("seconds since the first submission")
        return rendered(figure, form)


def _losses(axes: Axes, curves: LossCurves) -> None:
    light_grid(axes)
    axes.set_ylabel("loss per token")
    _curve(axes, curves.steps, BLUE, f"training, mean of {_window(curves.steps)} steps")
    _curve(axes, curves.scores, AMBER, f"serving, mean of {_window(curves.scores)} answers")
    axes.margins(x=0.02)
    if not curves.steps and not curves.scores:
        axes.text(
            0.5,
            0.5,
            "no step was committed, no answer scored",
            color=GREY,
            ha="center",
            transform=axes.transAxes,
        )


def _curve(axes: Axes, points: Sequence[Point], colour: str, mean: str) -> None:
    if not points:
        return
    axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
    smooth = running_mean(points, _window(points))
    axes.plot(*zip(*smooth, strict=True), color=colour, linewidth=2, label=mean)


def _window(points: Sequence[Point]) -> int:
    return max(5, len(points) // 10)


def _versions(axes: Axes, versions: Sequence[tuple[float, str]]) -> None:
    """Some of the versions, above the moments from which they served."""
    if not versions:
        return
    every = -(-len(versions) // _MOST_VERSIONS)
    above = axes.secondary_xaxis("top")
    above.set_xticks([t for t, _ in versions[::every]], [version for _, version in versions[::every]])
    above.set_xlabel("weights version served", color=GREY, fontsize=8.5)
    above.tick_params(colors=GREY, labelsize=8)


def _matches(axes: Axes, matches: Sequence[Point]) -> None:
    light_grid(axes)
    smooth = running_mean(matches, _window(matches))
    axes.plot(*zip(*smooth, strict=True), color=INK, linewidth=2)
    axes.set_ylabel("exact match")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"of the last {_window(matches)} answers", color=GREY, fontsize=8.5, loc="right")
