"""The rows of a study as its report tells them: means over seeds, ratios to others, the targets of `spp-gpt`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import exp, log
from statistics import fmean
from typing import Any, Final

from lemix_studies.experiments.settings import OURS, Setting, variant_of

Rows = Sequence[Mapping[str, Any]]

MEASURES: Final[Mapping[str, tuple[str, ...]]] = {
    "items per node-second, the paper's way": ("paper_throughput",),
    "items per node-second held": ("items_per_node_second",),
    "items per second": ("items_per_second",),
    "goodput per second": ("goodput_per_second",),
    "goodput per node-second": ("goodput_per_node_second",),
    "SLO attainment 1×": ("slo_attainment", "1"),
    "SLO attainment 5×": ("slo_attainment", "5"),
    "SLO attainment 10×": ("slo_attainment", "10"),
    "response p95 (s)": ("response_s", "p95"),
    "inference loss": ("inference_loss",),
    "time to first token p95 (s)": ("ttft_s", "p95"),
    "inter-token p95 (s)": ("itl_s", "p95"),
    "makespan (s)": ("duration_s",),
    "node-seconds": ("node_seconds",),
    "busy share": ("busy_share",),
}
_SETTING: Final = tuple(field.name for field in fields(Setting))
_AXES: Final = (
    *("model", "rate", "training_rate", "sigma", "rows", "length_order", "arrivals", "selection"),
)


def value_of(row: Mapping[str, Any], measure: str) -> float | None:
    """A measure of a row, by its name in `MEASURES`; None where there is none."""
    value: Any = row
    for name in MEASURES[measure]:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def label_of(row: Mapping[str, Any]) -> str:
    """Who decided."""
    return variant_of(row).label


def labels_of(rows: Rows) -> list[str]:
    """Who decided, each once, ours first."""
    return sorted(dict.fromkeys(map(label_of, rows)), key=lambda label: not _is_ours(label))


def place_of(row: Mapping[str, Any]) -> tuple[object, ...]:
    """The setting of a row: equal for the policies that met in it."""
    return tuple(row[name] for name in _SETTING)


def axes_of(rows: Rows) -> list[str]:
    """In what the settings of some rows differ, beside their seeds."""
    return [name for name in _AXES if len({row[name] for row in rows}) > 1]


def mean_by(rows: Rows, axis: str, measure: str) -> dict[str, dict[Any, float]]:
    """By label and value of an axis: the mean over everything else."""
    found: defaultdict[str, defaultdict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (value := value_of(row, measure)) is not None:
            found[label_of(row)][row[axis]].append(value)
    return {
        label: {at: fmean(found[label][at]) for at in sorted(found[label], key=_order)}
        for label in labels_of(rows)
        if label in found
    }


def geometric_mean(values: Iterable[float]) -> float | None:
    """Of what is above 0; None if nothing is."""
    logs = [log(value) for value in values if value > 0]
    return exp(fmean(logs)) if logs else None


def ratios(rows: Rows, ours: str, others: str, measure: str) -> list[float]:
    """Ours ÷ theirs, setting by setting."""
    theirs = {place_of(row): value_of(row, measure) for row in rows if label_of(row) == others}
    pairs = ((value_of(row, measure), theirs.get(place_of(row))) for row in rows if label_of(row) == ours)
    return [mine / other for mine, other in pairs if mine is not None and other]


def beaten(
    rows: Rows, ours: str, measure: str, *, lower_is_better: bool
) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Where somebody else is better by more than 2 %: who, by what factor, and that row of ours; the worst first."""
    found = []
    for settings in by_place(rows).values():
        mine = next((row for row in settings if label_of(row) == ours), None)
        own = value_of(mine, measure) if mine is not None else None
        if mine is None or own is None or not own:
            continue
        for row in settings:
            other = value_of(row, measure)
            if is_baseline(row) and other:
                factor = own / other if lower_is_better else other / own
                if factor > BETTER:
                    found.append((label_of(row), factor, mine))
    yield from sorted(found, key=lambda one: -one[1])


BETTER: Final = 1.02
"""What counts as better."""


def by_place(rows: Rows) -> dict[tuple[object, ...], list[Mapping[str, Any]]]:
    """The rows that met in each setting."""
    places: defaultdict[tuple[object, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        places[place_of(row)].append(row)
    return dict(places)


def is_baseline(row: Mapping[str, Any]) -> bool:
    """Another policy, as it would be run: not ours, nor one that is only a yardstick."""
    return row["policy"] != OURS and row["use_nodes"] is None


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [header, ["---", *["--:"] * (len(header) - 1)], *lines]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def table_by(rows: Rows, axis: str, measure: str, written: Callable[[float], str]) -> str:
    """A line a policy, a column a value of the axis; the best of each column is bold."""
    means = mean_by(rows, axis, measure)
    columns = sorted({at for line in means.values() for at in line}, key=_order)
    best = {at: _best([line[at] for line in means.values() if at in line], measure) for at in columns}

    def cell(line: Mapping[Any, float], at: Any) -> str:
        if at not in line:
            return "–"
        text = written(line[at])
        return f"**{text}**" if line[at] == best[at] and len(means) > 1 else text

    return markdown(
        [axis.replace("_", " "), *map(_written, columns)],
        ([label, *(cell(line, at) for at in columns)] for label, line in means.items()),
    )


def is_lower_better(measure: str) -> bool:
    """Seconds cost, and losses are; everything else is gained."""
    return measure.endswith("(s)") or measure in {"node-seconds", "inference loss"}


def _best(values: Sequence[float], measure: str) -> float:
    return min(values) if is_lower_better(measure) else max(values)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value) or "–"


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 0, 0.0, str(value or "")


def _is_ours(label: str) -> bool:
    return label.startswith(f"{OURS} ·")
