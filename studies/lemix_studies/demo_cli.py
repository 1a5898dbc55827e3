"""`lemix demo`: see a model learn while it serves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lemix.cli.errors import clear_errors
from lemix_common.logs import configure_logs
from lemix_common.settings import POLICIES, ClusterSettings
from lemix_studies.demo import demo_settings, demo_summary, run_demo
from lemix_studies.demo_plan import DemoOptions
from lemix_studies.report import report_directory, write_report
from lemix_studies.wording import duration, share

DEFAULT_REPORT = Path("demo-report")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(demo))


def demo(
    *,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the facts that change, the questions, their times.")
    ] = 0,
    has_training: Annotated[
        bool, typer.Option("--train/--no-train", help="Send the corrections, or only ask.")
    ] = True,
    policy: Annotated[str, typer.Option(help=f"Where items run: {', '.join(POLICIES)}.")] = POLICIES[0],
    report: Annotated[Path, typer.Option(help="Directory.")] = DEFAULT_REPORT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Watch a model learn while it serves: a minute of questions, with corrections on the way."""
    configure_logs("demo", level="warning")
    options = DemoOptions(seed=seed, has_training=has_training)
    settings = demo_settings(options, policy)
    directory = report_directory(report, "demo")
    console = Console(stderr=True)
    console.print(introduction(settings, options), highlight=False)
    outcome = run_demo(settings, options, directory, console)
    summary = demo_summary(outcome, options, directory)
    write_report(directory, outcome, summary, command="lemix demo")
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        Console().print(*demo_tables(summary), sep="\n")


def introduction(settings: ClusterSettings, options: DemoOptions) -> str:
    """What is about to be seen."""
    lessons = options.changed_facts * options.examples_per_fact
    meanwhile = (
        f"{lessons} corrections arrive as training examples, in other words than the questions"
        if options.has_training
        else "nobody corrects it"
    )
    return (
        f"A small model knows a catalogue by heart; {options.changed_facts} facts of it have changed since.\n"
        f"{settings.nodes} nodes of {settings.stages} stages ({settings.policy}) answer questions about them "
        f"for a minute. Meanwhile {meanwhile}."
    )


def demo_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What the model learned, and what it cost."""
    return [_learned(summary), _served(summary)]


def _learned(summary: Mapping[str, Any]) -> Table:
    table = Table("", "first fifth", "last fifth", title="what was learned", title_justify="left")
    answers = {name: math.ceil(number / 5) for name, number in summary["answers"].items()}
    for name, words, shown in (
        ("exact_match", "exact match", share),
        ("exact_match_changed", f"  of facts that changed ({answers['changed']} answers)", share),
        ("exact_match_unchanged", f"  of other facts ({answers['unchanged']} answers)", share),
        ("serving_loss", "serving loss", "{:.3f}".format),
    ):
        values = [summary[name][when] for when in ("before", "after")]
        table.add_row(words, *("–" if value is None else shown(value) for value in values))
    return table


def _served(summary: Mapping[str, Any]) -> Table:
    table = Table(title="how it was served", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    versions = summary["weights_versions"]
    rows = {
        "items": f"{summary['done']} of {summary['submitted']} done, {summary['items_per_second']:.1f}/s",
        "response": ", ".join(
            f"{name} {duration(value or 0.0)}" for name, value in summary["response_s"].items()
        ),
        "within SLO": ", ".join(
            f"{share(part)} in {factor} × idle" for factor, part in summary["slo_attainment"].items()
        ),
        "training": f"{summary['steps']} steps, tax {share(summary['training_tax'])}",
        "versions served": f"{len(versions)}, {versions[0]} to {versions[-1]}" if versions else "none",
        **{f"sha256 of node {node}": sha256 for node, sha256 in summary["weights_sha256"].items()},
        "report": f"{summary['report_dir']}/report.html",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
