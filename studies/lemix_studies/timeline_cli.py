"""`lemix timeline`: a picture of what the stages do, of a report or of a cluster that runs."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from lemix.cli.errors import clear_errors
from lemix.discovery import find_cluster
from lemix_common.broker import Broker, connect
from lemix_common.errors import BadInput, ClusterError
from lemix_common.logs import configure_logs
from lemix_common.store.cluster import Cluster
from lemix_studies.pictures import require_matplotlib
from lemix_studies.pieces import TRAINING
from lemix_studies.recordings import Recording, recording_of
from lemix_studies.spans import Span, recent_spans
from lemix_studies.timelines import chosen_window
from lemix_studies.trace_file import TRACE, read_trace_file

LAST_S = 60.0
"""Of a cluster's work, if no moment is given that needs more."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(timeline))


def timeline(
    *,
    from_s: Annotated[
        float | None,
        typer.Option(
            "--from",
            help="First second to draw; below 0: so long before the end of the last work.",
            show_default=False,
        ),
    ] = None,
    to_s: Annotated[
        float | None,
        typer.Option(
            "--to", help="Last second to draw, likewise (default: as much as reads well).", show_default=False
        ),
    ] = None,
    node: Annotated[
        list[int] | None, typer.Option(help="Only this node; may be repeated.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory of a report (default: the cluster that runs).")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Broker of a cluster that runs.", show_default=False)
    ] = None,
    svg: Annotated[bool, typer.Option("--svg", help="Draw SVG instead of PNG.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (default: timeline.png or .svg).")
    ] = None,
) -> None:
    """Draw who computed what on which stage, and who waited for what.

    Without --from and --to, a stretch in which much happened is chosen.
    """
    configure_logs("timeline", level="warning")
    if report is not None and url is not None:
        raise BadInput("give --report to draw a report, or --url to draw a cluster, not both")
    require_matplotlib()
    from lemix_studies.pictures.timeline import timeline_picture

    recording = _of_report(report) if report is not None else _of_cluster(url, from_s, to_s)
    recording = recording.of_nodes(node or ())
    window = chosen_window(recording.pieces, from_s, to_s)
    as_svg = svg or (output is not None and output.suffix.lower() == ".svg")
    file = output or Path("timeline.svg" if as_svg else "timeline.png")
    picture = timeline_picture(recording, window, form="svg" if as_svg else "png")
    try:
        file.write_bytes(picture)
    except OSError as error:
        raise BadInput(f"{file} can't be written ({error.strerror})") from None
    typer.echo(f"{file}: {window[0]:.6g} to {window[1]:.6g} {recording.clock}")


def _of_report(directory: Path) -> Recording:
    return read_trace_file(directory / TRACE if directory.is_dir() else directory)


def _of_cluster(url: str | None, from_s: float | None, to_s: float | None) -> Recording:
    """What a cluster did lately; all that its events stream still has, if a moment counts from its beginning."""
    address = find_cluster(url)
    broker = connect(address.url, address.cluster, patience_s=2.0)
    with closing(broker.client):
        if not broker.hash(broker.keys.model):
            raise ClusterError(
                f"no cluster {broker.keys.cluster!r} on this broker: start one with `lemix up`"
            )
        settings = Cluster(broker).settings()
        counts_from_end = [moment for moment in (from_s, to_s) if moment is not None and moment < 0]
        is_all = any(moment is not None and moment >= 0 for moment in (from_s, to_s))
        spans = recent_spans(
            broker, None if is_all else max([LAST_S, *(-moment for moment in counts_from_end)])
        )
        if not spans:
            raise BadInput("there is nothing to draw yet: no stage has reported any work")
        zero = min(float(span["start"]) for span in spans)
        return recording_of(
            spans,
            zero=zero,
            steps=_examples(broker, spans),
            nodes=settings.nodes,
            title=settings.policy,
            clock=f"seconds since {_moment(zero)}",
        )


def _moment(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"


def _examples(broker: Broker, spans: list[Span]) -> dict[str, list[str]]:
    """The examples of the steps that spans are of, as far as they are known."""
    steps = sorted({":".join(span["item"].split(":")[:2]) for span in spans if span["cat"] in TRAINING})
    keys = [broker.keys.step(run, int(number)) for run, number in (step.split(":") for step in steps)]
    hashes = broker.hashes(keys)
    return {
        step: json.loads(fields["items"])
        for step, fields in zip(steps, hashes, strict=True)
        if "items" in fields
    }
