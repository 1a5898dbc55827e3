"""The report of a run: its figures, its items and steps, the stages' time, pictures, and a page that shows them.

Without matplotlib there are no pictures; the rest is written all the same.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from lemix import Score
from lemix_common.errors import BadInput
from lemix_studies.curves import exact_matches, latency_curves, loss_curves, started_at
from lemix_studies.measures import ItemTimes, before_and_after, count_duplicated, count_lost, summarize
from lemix_studies.page import report_page
from lemix_studies.pictures import require_matplotlib
from lemix_studies.recordings import Recording, recording_of
from lemix_studies.replay import Outcome
from lemix_studies.spans import blocked_by_item
from lemix_studies.timelines import chosen_window
from lemix_studies.trace_file import TRACE, chrome_trace
from lemix_studies.wording import duration
from lemix_studies.workload import WorkloadOptions

log = structlog.get_logger()

HISTORY = "history.jsonl"
PICTURES = ("timeline.png", "timeline.svg", "loss.png", "latency.png")
_COLUMNS = (
    "item", "line", "kind", "at_s", "prompt_tokens", "reference_tokens", "capped", "end", "weights_version",
    "response_s", "predicted_response_s", "ttft_s", "mean_itl_s", "loss",
)  # fmt: skip


def report_directory(given: Path | None, command: str, now: datetime | None = None) -> Path:
    """The directory of a report, made and empty of older parts; `BadInput` if it can't be written."""
    moment = now or datetime.now(UTC)
    directory = given or Path("reports") / f"{command}-{moment:%Y%m%dT%H%M%SZ}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / HISTORY).write_text("", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{directory}: no report can be written there ({error.strerror})") from None
    return directory


def summary_of(outcome: Outcome, options: WorkloadOptions, directory: Path) -> dict[str, object]:
    """The object of `lemix replay --json`."""
    generations = [item for item, arrival in outcome.arrivals.items() if arrival.kind == "generate"]
    lengths = {item: len(outcome.arrivals[item].reference) for item in generations}
    blocked_s = blocked_by_item(outcome.spans)
    losses = [answer.loss for answer in outcome.answers.values() if isinstance(answer, Score)]
    matches = list(exact_matches(outcome).values())
    step_losses = [step.loss for step in outcome.steps if step.loss is not None]
    return summarize(outcome.items, outcome.idle, nodes=outcome.nodes, blocked_s=blocked_s) | {
        "lost": count_lost(outcome.items, lengths),
        "duplicated": count_duplicated(outcome.items, [step.items for step in outcome.steps]),
        "dead_lettered": outcome.dead_lettered,
        "capped": sum(arrival.is_capped for arrival in outcome.arrivals.values()),
        "serving_loss": before_and_after(losses),
        "exact_match": before_and_after(matches),
        "step_loss": before_and_after(step_losses),
        "steps": len(outcome.steps),
        "max_lateness_s": outcome.max_lateness_s,
        "weights_sha256": outcome.weights_sha256,
        "factors": {"time": options.time_scale, "length": options.length_scale},
        "seed": options.seed,
        "report_dir": str(directory),
    }


def write_report(
    directory: Path, outcome: Outcome, summary: Mapping[str, object], *, command: str = "lemix replay"
) -> None:
    """Every file but the history, which was written as it happened."""
    recording = _recording(outcome, command)
    _write_json(directory / "summary.json", summary, indent=2)
    _write_json(directory / TRACE, chrome_trace(recording))
    with (directory / "steps.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(step)) + "\n" for step in outcome.steps)
    with (directory / "items.csv").open("w", encoding="utf-8", newline="") as table:
        rows = csv.DictWriter(table, _COLUMNS)
        rows.writeheader()
        rows.writerows(_row(outcome, item) for item in outcome.items)
    try:
        pictures, note = _pictures(outcome, recording), ""
    except BadInput as error:
        pictures, note = {}, f"Without pictures: {error}."
        log.warning("report_without_pictures", reason=str(error))
    for name in PICTURES:
        (directory / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        (directory / name).write_bytes(picture)
    embedded = {name: picture for name, picture in pictures.items() if name.endswith(".png")}
    page = report_page(
        summary, embedded, title=recording.title, subtitle=_subtitle(outcome, summary), note=note
    )
    (directory / "report.html").write_text(page, encoding="utf-8")


def _recording(outcome: Outcome, command: str) -> Recording:
    """The stages' time since the first submission; what measured the idle cluster before is left out."""
    return recording_of(
        outcome.spans,
        zero=started_at(outcome.items),
        steps={f"{step.run_id}:{step.step}": step.items for step in outcome.steps},
        nodes=outcome.nodes,
        title=f"{command} · {outcome.policy}".removesuffix(" · "),
        clock="seconds since the first submission",
    )


def _pictures(outcome: Outcome, recording: Recording) -> dict[str, bytes]:
    """The pictures that can be drawn, by their files' names; `BadInput` if there is nothing to draw them with."""
    require_matplotlib()
    from lemix_studies.pictures.latency import latency_picture
    from lemix_studies.pictures.loss import loss_picture
    from lemix_studies.pictures.timeline import timeline_picture

    pictures = {}
    if any(not piece.is_idle for piece in recording.pieces):
        window = chosen_window(recording.pieces, None, None)
        pictures["timeline.png"] = timeline_picture(recording, window)
        pictures["timeline.svg"] = timeline_picture(recording, window, form="svg")
    pictures["loss.png"] = loss_picture(loss_curves(outcome), title=recording.title)
    pictures["latency.png"] = latency_picture(latency_curves(outcome), title=recording.title)
    return pictures


def _subtitle(outcome: Outcome, summary: Mapping[str, Any]) -> str:
    stages = {piece["stage"] for piece in outcome.spans}
    shape = f"{outcome.nodes} nodes × {len(stages)} stages" if stages else f"{outcome.nodes} nodes"
    return f"{shape} · {duration(summary['duration_s'])} · seed {summary['seed']}"


def _row(outcome: Outcome, item: ItemTimes) -> dict[str, object]:
    arrival, answer = outcome.arrivals[item.item], outcome.answers.get(item.item)
    gaps = item.gaps_s
    return {
        "item": item.item,
        "line": arrival.line,
        "kind": item.kind,
        "at_s": round(arrival.at_s, 6),
        "prompt_tokens": len(arrival.prompt),
        "reference_tokens": len(arrival.reference),
        "capped": int(arrival.is_capped),
        "end": " ".join(item.ends) or ("refused" if item.was_refused else "none"),
        "weights_version": item.weights_version,
        "response_s": item.response_s,
        "predicted_response_s": item.predicted_response_s,
        "ttft_s": item.ttft_s,
        "mean_itl_s": sum(gaps) / len(gaps) if gaps else None,
        "loss": answer.loss if isinstance(answer, Score) else None,
    }


def _write_json(path: Path, value: object, *, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
