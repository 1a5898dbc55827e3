"""Lines over what a study varies: a panel a model, a line a policy, told apart by colour, marker and dashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from lemix_studies.experiments.tables import Rows, axes_of, labels_of, mean_by, value_of
from lemix_studies.pictures.colours import BLACK, GREY, LINES
from lemix_studies.pictures.style import DPI, Format, house_style, light_grid, rendered
from lemix_studies.wording import duration

PANELS: Final[Mapping[str, Sequence[str]]] = {
    "throughput": (
        "items per node-second, the paper's way",
        "items per node-second held",
        "items per second",
    ),
    "goodput": ("goodput per second", "goodput per node-second"),
    "slo": ("SLO attainment 1×", "SLO attainment 5×", "SLO attainment 10×"),
    "response": ("response p95 (s)", "makespan (s)", "node-seconds"),
    "loss": ("inference loss",),
    "tokens": ("time to first token p95 (s)", "inter-token p95 (s)"),
}
"""A picture each; a row a measure."""
NAMES: Final = {
    "rate": "requests a second (λ)",
    "training_rate": "training rate (r)",
    "sigma": "standard deviation of lengths (σ, tokens)",
    "rows": "batch size",
}
_WIDTH_IN, _ROW_IN, _LEGEND_IN = 3.4, 2.3, 0.26
_MARKERS: Final = "osD^vP<>Xhp*"
_MOST_LINES: Final = 16
_FEW: Final = (1.0, 2.0, 5.0)
_MANY: Final = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Where an axis is marked within a decade; the more where it spans little."""
_FAR: Final = 8.0
_LEGEND_COLUMNS: Final = 4


def study_pictures(rows: Rows, study: str, *, form: Format = "png") -> dict[str, bytes]:
    """By name without suffix: a picture for each group of measures and each thing that was varied along a line."""
    axes = [name for name in axes_of(rows) if name in NAMES] or ["rate"]
    pictures = {}
    for group, measures in PANELS.items():
        known = [name for name in measures if any(value_of(row, name) is not None for row in rows)]
        for axis in axes if known else ():
            pictures[f"{group}-by-{axis.replace('_', '-')}"] = _picture(rows, study, axis, known, form)
    return pictures


def _picture(rows: Rows, study: str, axis: str, measures: Sequence[str], form: Format) -> bytes:
    models = sorted({str(row["model"]) for row in rows}, key=[str(row["model"]) for row in rows].index)
    labels = labels_of([row for row in rows if row["use_nodes"] is None])[:_MOST_LINES]
    num_legend_rows = -(-len(labels) // _LEGEND_COLUMNS)
    with house_style():
        figure = Figure(
            figsize=(
                max(9.0, 0.6 + _WIDTH_IN * len(models)),
                0.7 + _ROW_IN * len(measures) + _LEGEND_IN * num_legend_rows,
            ),
            dpi=DPI,
            layout="constrained",
        )
        figure.suptitle(study, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = figure.subplots(len(measures), len(models), squeeze=False, sharex=True, sharey="row")
        for model, column in zip(models, grid.T, strict=True):
            own = [row for row in rows if row["model"] == model]
            for measure, panel in zip(measures, column, strict=True):
                _panel(panel, mean_by(own, axis, measure), measure, labels)
                _along(panel, sorted({float(row[axis]) for row in rows if row[axis] is not None}), axis)
            column[0].set_title(_title(model, own))
            column[-1].set_xlabel(NAMES[axis])
        for measure, panel in zip(measures, grid[:, 0], strict=True):
            panel.set_ylabel(measure.replace(", the", ",\nthe"))
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=_LEGEND_COLUMNS, handlelength=3.2)
        return rendered(figure, form)


def _title(model: str, rows: Rows) -> str:
    computed_by = {str(row["computed_by"]) for row in rows if row.get("computed_by")}
    return f"{', '.join(sorted(computed_by))} in place of {model}" if computed_by else model


def _panel(
    panel: Axes, lines: Mapping[str, Mapping[Any, float]], measure: str, labels: Sequence[str]
) -> None:
    light_grid(panel)
    for number, label in reversed(list(enumerate(labels))):
        line = {float(at): value for at, value in lines.get(label, {}).items() if at is not None}
        panel.plot(list(line), list(line.values()), label=label, **look_of(label, number))
    handles, _ = panel.get_legend_handles_labels()
    for handle in reversed(handles):  # the legend has ours first, drawn last and so on top
        handle.remove()
        panel.add_line(handle)  # type: ignore[arg-type]
    if "attainment" in measure:
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif measure != "inference loss":
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(LogLocator(10, subs=_FEW if high > _FAR * low else _MANY, numticks=12))
        panel.yaxis.set_minor_locator(NullLocator())
        is_time = measure.endswith("(s)")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: duration(y) if is_time else f"{y:g}"))


def _along(panel: Axes, values: Sequence[float], axis: str) -> None:
    if axis == "rate" and values and values[-1] > 4 * max(values[0], 1e-9):
        panel.set_xscale("log")
    shown: list[float] = []
    for value in values:
        is_log = panel.get_xscale() == "log"
        far = not shown or (value / shown[-1] >= 1.45 if is_log else True)
        if far:
            shown.append(value)
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.tick_params(axis="x", labelrotation=45 if len(shown) > 7 else 0)


def look_of(label: str, number: int) -> dict[str, Any]:
    """Ours black and thick, by preference solid, dashed or dotted; others coloured; those with a plus dashed."""
    base, _, rest = label.partition(",")
    is_ours = label.startswith("lemix ·")
    if rest:  # the same policy, changed: a colour for what was changed, a marker for how
        changed = rest.split()[-2] if rest[-1].isdigit() else rest
        known = list(LINES.values())
        colour = known[sum(map(ord, changed)) % len(known)]
        return _line(colour, "-" if is_ours else "--", _MARKERS[number % len(_MARKERS)], 1.4, 4, 0.85)
    if is_ours:
        dashes = {"balanced": "-", "nodes": (0, (5, 1.5)), "speed": (0, (1.5, 1.2))}
        prefer = base.removeprefix("lemix · ")
        marker = {"nodes": "s", "speed": "^"}.get(prefer, "o")
        return _line(BLACK, dashes.get(prefer, "-"), marker, 2.2, 5, 0.9)
    colour = LINES.get(base.removesuffix("+"), GREY)
    is_kept = base.endswith("+")
    known = [*LINES, base.removesuffix("+")]
    marker = _MARKERS[known.index(base.removesuffix("+")) % len(_MARKERS)]
    return _line(colour, (0, (3, 2)) if is_kept else "-", marker, 1.3, 4, 0.85)


def _line(colour: str, dashes: Any, marker: str, width: float, size: float, alpha: float) -> dict[str, Any]:
    return {
        "color": colour, "linestyle": dashes, "marker": marker, "linewidth": width,
        "markersize": size, "alpha": alpha, "markeredgewidth": 0,
    }  # fmt: skip
