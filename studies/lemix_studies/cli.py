"""The commands of this package."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer

from lemix.cli.errors import clear_errors
from lemix.connection import open_connection
from lemix.discovery import Address, find_cluster
from lemix.model_folder import open_model_folder
from lemix.running import running_cluster
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs
from lemix_common.settings import ClusterSettings, load_settings
from lemix_studies.replay import PATIENCE_S, new_prefix, run_replay
from lemix_studies.report import HISTORY, report_directory, summary_of, write_report
from lemix_studies.texts import read_texts
from lemix_studies.traces import read_trace
from lemix_studies.workload import Task, WorkloadOptions, plan_workload

_OF_OWN_CLUSTER = "with --model, which starts a cluster of the replay's own"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(clear_errors(replay))


def replay(
    *,
    trace: Annotated[Path, typer.Option(help="Arrivals and lengths: Azure's .csv or Mooncake's .jsonl.")],
    text: Annotated[Path, typer.Option(help="What prompts are made of: JSONL rows or plain text.")],
    model: Annotated[
        str | None, typer.Option(help="Start a cluster of this model (else one that runs).")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Pipeline replicas, with --model.")] = None,
    stages: Annotated[int | None, typer.Option(help="Stages of each node, with --model.")] = None,
    policy: Annotated[str | None, typer.Option(help="Where items run, with --model.")] = None,
    step_examples: Annotated[int | None, typer.Option(help="Training examples a step, with --model.")] = None,
    keep_data: Annotated[
        Path | None, typer.Option(help="Keep that cluster's data here, with --model.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Of the trace (default: all of it).")] = None,
    time_scale: Annotated[float, typer.Option(help="Multiplies arrival times.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiplies numbers of tokens.")] = 1.0,
    train_every: Annotated[
        int, typer.Option(help="Each so many-th line is a training example; 0: none.")
    ] = 0,
    task: Annotated[str, typer.Option(help="What requests ask for: generate or score.")] = "generate",
    seed: Annotated[int, typer.Option(help="Of the texts' choice, and of the cluster's.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Directory (default: reports/replay-UTC/).")] = None,
    url: Annotated[str | None, typer.Option(help="Broker of a cluster that runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Drive a cluster with a trace's arrivals, in real time, and report what its clients saw."""
    configure_logs("replay", level="warning")
    options = WorkloadOptions(
        minutes=minutes,
        time_scale=time_scale,
        length_scale=length_scale,
        train_every=train_every,
        task=cast("Task", task),
        seed=seed,
    )
    settings = _settings(
        model, seed, url, keep_data, nodes=nodes, stages=stages, policy=policy, step_examples=step_examples
    )
    lines, texts = read_trace(trace, seed=seed), read_texts(text)
    directory = report_directory(report, "replay")
    with _cluster(settings, keep_data, url) as (address, prefix):
        connection = open_connection(address, patience_s=PATIENCE_S)
        tokenization = connection.tokenization
        arrivals = plan_workload(
            lines, texts, tokenization.prompt_ids, options, context_length=tokenization.card.context_length
        )
        with closing(connection.broker.client), (directory / HISTORY).open("w", encoding="utf-8") as history:
            outcome = run_replay(connection, arrivals, history, prefix=prefix, data_dir=address.data_dir)
    summary = summary_of(outcome, options, directory)
    write_report(directory, outcome, summary)
    typer.echo(json.dumps(summary) if as_json else _in_words(summary))


def _settings(
    model: str | None, seed: int, url: str | None, keep_data: Path | None, **given: object
) -> ClusterSettings | None:
    """Those of a cluster to start, checked; None to use one that runs."""
    if model is None:
        for name, value in {**given, "keep_data": keep_data}.items():
            if value is not None:
                raise BadInput(f"--{name.replace('_', '-')} can only be given {_OF_OWN_CLUSTER}")
        return None
    if url is not None:
        raise BadInput("give --model to start a cluster, or --url to use one, not both")
    settings = load_settings(None, None, model=model, seed=seed, **given)
    open_model_folder(settings.model, stages=settings.stages)
    return settings


@contextmanager
def _cluster(
    settings: ClusterSettings | None, keep_data: Path | None, url: str | None
) -> Iterator[tuple[Address, str]]:
    """The cluster to drive, and what its items are called."""
    if settings is None:
        yield find_cluster(url), new_prefix()
        return
    with tempfile.TemporaryDirectory(prefix="lemix-replay-") as temporary:
        data_dir = keep_data or Path(temporary)
        with running_cluster(settings, data_dir=data_dir) as started:
            yield Address(started, "lemix", data_dir.absolute()), "replay"


def _in_words(summary: dict[str, object]) -> str:
    counts = ", ".join(
        f"{summary[name]} {name}" for name in ("submitted", "done", "failed", "lost", "duplicated")
    )
    return f"{counts}, {summary['steps']} steps; report in {summary['report_dir']}"
