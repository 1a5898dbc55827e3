"""A study's report: points.csv, summary.json, report.md, and pictures as PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lemix_studies.experiments.journal import write_table
from lemix_studies.experiments.runners import CloseUp
from lemix_studies.experiments.tables import (
    MEASURES,
    Rows,
    axes_of,
    beaten,
    geometric_mean,
    is_lower_better,
    labels_of,
    markdown,
    place_of,
    ratios,
    table_by,
)
from lemix_studies.experiments.targets import as_objects, point_in_words, targets_of
from lemix_studies.pictures import require_matplotlib
from lemix_studies.wording import share

SUMMARY: Final = "summary.json"
REPORT: Final = "report.md"
_RATIOS: Final = (
    "items per node-second, the paper's way", "items per second", "goodput per second",
    "goodput per node-second", "response p95 (s)", "makespan (s)", "node-seconds",
)  # fmt: skip
_MOST_BEATEN: Final = 10
_ON: Final = {
    "simulator": "on the simulator",
    "emulated": "on emulated accelerators",
    "real": "on this machine",
}
_LOSS: Final = "Inference loss needs a model that computes: it is there with `--on real` only."


def summary_of(study: str, rows: Rows, *, where: str, directory: Path, quick: bool) -> dict[str, Any]:
    """The object of summary.json and `--json`."""
    return {
        "study": study,
        "on": where,
        "quick": quick,
        "seeds": sorted({row["seed"] for row in rows}),
        "report_dir": str(directory),
        "targets": as_objects(targets_of(rows)) if study == "spp-gpt" else [],
        "points": list(rows),
    }


def write_study(
    directory: Path,
    summary: Mapping[str, Any],
    close_ups: Mapping[str, CloseUp],
    *,
    no_pictures: bool = False,
) -> None:
    """All files of the report."""
    rows = summary["points"]
    write_table(directory, rows)
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    pictures = {} if no_pictures else _pictures(summary, close_ups)
    for name, picture in pictures.items():
        (directory / name).write_bytes(picture)
    names = [name for name in pictures if name.endswith(".png")]
    (directory / REPORT).write_text("\n".join(_report(summary, names)), encoding="utf-8")


def _pictures(summary: Mapping[str, Any], close_ups: Mapping[str, CloseUp]) -> dict[str, bytes]:
    """By file name."""
    require_matplotlib()
    from lemix_studies.pictures.activity import activity_picture, dependencies_picture, idleness_picture
    from lemix_studies.pictures.study import study_pictures

    forms: tuple[Any, ...] = ("png", "svg")
    pictures = {}
    for form in forms:
        for name, picture in study_pictures(summary["points"], summary["study"], form=form).items():
            pictures[f"{name}.{form}"] = picture
        if close_ups:
            pictures[f"idleness.{form}"] = idleness_picture(close_ups, form=form)
            pictures[f"active-nodes.{form}"] = activity_picture(close_ups, form=form)
        for label, close_up in close_ups.items():
            name = "timeline-" + label.replace(" · ", "-").replace(" ", "-").replace(",", "")
            pictures[f"{name}.{form}"] = dependencies_picture(close_up, form=form)
    return pictures


def _report(summary: Mapping[str, Any], pictures: Sequence[str]) -> Iterator[str]:
    rows: Rows = summary["points"]
    yield f"# {summary['study']}\n"
    seeds = ", ".join(map(str, summary["seeds"]))
    kinds = len({place_of(row) for row in rows})
    yield f"{len(rows)} points in {kinds} settings {_ON.get(summary['on'], '')}; seeds {seeds}."
    yield from _computed_by(rows)
    yield _counts(rows)
    if summary["quick"]:
        yield "A quick run: fewer settings and items than the study has."
    if summary["on"] == "simulator":
        yield _LOSS
    yield "A node-second is counted while a node holds weights; the paper's way counts from a node's first start to its"
    yield "last end. Means are over all other axes and seeds.\n"
    if summary["targets"]:
        yield "## Targets\n"
        yield markdown(
            ["target", "value", "limit", "points that hold", "met", "worst point"],
            [
                [
                    one["name"],
                    "–" if one["value"] is None else f"{one['value']:.3f}",
                    f"{one['limit']:g}",
                    f"{one['held']} of {one['points']}",
                    "yes" if one["met"] else "no",
                    one["worst"] or "–",
                ]
                for one in summary["targets"]
            ],
        )
    for axis in [name for name in axes_of(rows) if name != "seed"] or ["rate"]:
        yield f"## By {axis.replace('_', ' ')}\n"
        for measure in MEASURES:
            written = share if "attainment" in measure or "share" in measure else "{:.4g}".format
            table = table_by(rows, axis, measure, written)
            if table.count("\n") > 2:
                yield f"{measure}:\n"
                yield table
    yield from _against_others(rows)
    if pictures:
        yield "## Pictures\n"
        yield from (f"![{name.removesuffix('.png')}]({name})\n" for name in pictures)


def _computed_by(rows: Rows) -> Iterator[str]:
    """Which models stood for those of the study."""
    for own, folder in sorted({(row["model"], row["computed_by"]) for row in rows if row.get("computed_by")}):
        yield f"{folder} computed in place of {own}."


def _counts(rows: Rows) -> str:
    """What became of all items."""
    total = {
        name: sum(row.get(name) or 0 for row in rows) for name in ("submitted", "done", "lost", "duplicated")
    }
    return "{submitted} items were submitted, {done} done, {lost} lost, {duplicated} done twice.".format(
        **total
    )


def _against_others(rows: Rows) -> Iterator[str]:
    labels = labels_of(rows)
    ours = [label for label in labels if label.startswith("lemix ·")]
    others = [label for label in labels if label not in ours]
    for mine in ours:
        yield f"## {mine} ÷ others\n"
        yield "Geometric means over settings; of seconds less is better.\n"
        yield markdown(
            ["other", *_RATIOS],
            [
                [other, *(_ratio(geometric_mean(ratios(rows, mine, other, measure))) for measure in _RATIOS)]
                for other in others
            ],
        )
        lines = []
        for measure in ("goodput per second", "goodput per node-second", "response p95 (s)", "node-seconds"):
            found = list(beaten(rows, mine, measure, lower_is_better=is_lower_better(measure)))
            lines += [
                [measure, who, f"{factor:.3f}", point_in_words(row)]
                for who, factor, row in found[: _MOST_BEATEN // 2]
            ]
            if len(found) > _MOST_BEATEN // 2:
                lines.append([measure, f"and {len(found) - _MOST_BEATEN // 2} more", "", ""])
        if lines:
            yield f"Where {mine} is beaten by more than 2 %, the worst first:\n"
            yield markdown(["measure", "by", "factor", "point"], lines)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
