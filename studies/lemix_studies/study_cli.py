"""`lemix study`: the paper's experiments, run and told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lemix.cli.errors import clear_errors
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs
from lemix_studies.accelerators import MODELS
from lemix_studies.experiments.journal import Journal, Row
from lemix_studies.experiments.lengths import read_lengths
from lemix_studies.experiments.matrix import STUDIES, Plan, StudyOptions, plans_of
from lemix_studies.experiments.reporting import summary_of, write_study
from lemix_studies.experiments.runners import CloseUp, Runner, runner_for
from lemix_studies.experiments.running import run_tasks, tasks_of
from lemix_studies.experiments.settings import Point, Setting, key_of
from lemix_studies.experiments.tables import geometric_mean, labels_of, ratios
from lemix_studies.experiments.workloads import Sources
from lemix_studies.traces import read_trace

ALL = "all"
_CLOSE_UPS = (
    "lemix · balanced",
    "lemix · nodes",
    "lemix · speed",
    "lemix-paper",
    "separate",
    "naive-mix",
    "jsq",
)
_MOST_PROCESSES = 2


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(study))


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help=" | ".join([*STUDIES, ALL]))],
    *,
    where: Annotated[str, typer.Option("--on", help="simulator, emulated or real.")] = "simulator",
    quick: Annotated[bool, typer.Option("--quick", help="A few settings, fewer items, one seed.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="One seed (default: the study's).", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Several: 0,1,2 or 0-4.")] = "",
    repeats: Annotated[
        int | None, typer.Option(min=1, help="So many seeds, from --seed on.", show_default=False)
    ] = None,
    policies: Annotated[str, typer.Option(help="Only these, by commas.")] = "",
    models: Annotated[str, typer.Option(help="Only these, by commas.")] = "",
    rates: Annotated[str, typer.Option(help="Requests a second, by commas.")] = "",
    training_rates: Annotated[str, typer.Option(help="Parts that are trained, by commas.")] = "",
    items: Annotated[int | None, typer.Option(min=1, help="Of a point.", show_default=False)] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Instead of the study's.", show_default=False)
    ] = None,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Instead of the study's.", show_default=False)
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, all, alternating, or trace with --trace.")] = "",
    order: Annotated[
        str, typer.Option(help="What stages do next, under all policies: fifo or urgency.")
    ] = "fifo",
    device: Annotated[str, typer.Option(help="a100-80g, h100, or a profile's .json.")] = "a100-80g",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model that computes, with --on real.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="CSV of query_tokens,reference_tokens (default: drawn).")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Arrivals of a trace: .csv or .jsonl.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=_MOST_PROCESSES, help="Points at once, on the simulator.")
    ] = _MOST_PROCESSES,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that --report has.")] = False,
    report: Annotated[Path | None, typer.Option(help="Directory (default: reports/study-NAME-UTC/).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Repeat an experiment of the LeMix paper, every policy under the same arrivals."""
    configure_logs("study", level="warning")
    if name != ALL and name not in STUDIES:
        raise BadInput(f"no study is called {name!r}; there are {', '.join(STUDIES)} and {ALL}")
    if resume and report is None:
        raise BadInput("--resume needs --report: the directory of the study to go on with")
    if (where == "real") != (model is not None):
        raise BadInput("--on real needs --model FOLDER, the model that computes; elsewhere there is none")
    if arrivals == "trace" and trace is None:
        raise BadInput("--arrivals trace needs --trace FILE")
    sources = Sources(
        rows=tuple(read_lengths(lengths)) if lengths else (),
        trace_s=tuple(line.arrival_s for line in read_trace(trace, seed=seed or 0)) if trace else (),
        context_lengths={name: shape.positions for name, shape in MODELS.items()},
        model_folder=model,
    )
    runner = runner_for(where, sources)
    options = StudyOptions(
        quick=quick,
        seeds=_seeds(seed, seeds, repeats),
        policies=_words(policies),
        models=_known_models(models),
        rates=_numbers("--rates", rates, least=0, most=float("inf")),
        training_rates=_numbers("--training-rates", training_rates, least=-1, most=1),
        items=items,
        nodes=nodes,
        stages=stages,
        arrivals=_one_of("--arrivals", arrivals, ("poisson", "all", "alternating", "trace")) or None,
        stage_order=_one_of("--order", order, ("fifo", "urgency")),
        device=device,
        saturation=lambda setting: runner.saturation(setting) or setting.rate,
    )
    directory = report or Path("reports") / f"study-{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = list(STUDIES) if name == ALL else [name]
    summaries = {
        one: _run_one(
            one, options, directory / one if name == ALL else directory,
            where=where, sources=sources, runner=runner, processes=processes, resumes=resume,
        )
        for one in names
    }  # fmt: skip
    if as_json:
        whole = {"study": ALL, "report_dir": str(directory), "studies": list(summaries.values())}
        typer.echo(json.dumps(whole if name == ALL else summaries[name]))
    else:
        Console().print(*(_table(summary) for summary in summaries.values()), sep="\n")


def _run_one(
    name: str,
    options: StudyOptions,
    directory: Path,
    *,
    where: str,
    sources: Sources,
    runner: Runner,
    processes: int,
    resumes: bool,
) -> dict[str, Any]:
    """Run a study and write its report."""
    plans = plans_of(name, options)
    if not plans:
        raise BadInput(f"the study {name!r} has no point of these policies")
    journal = _journal(directory)
    done = journal.begin(resumes=resumes)
    for row in done.values():
        if (ran_on := row.get("on", where)) != where:
            raise BadInput(f"{directory} has points of --on {ran_on}: give another --report for --on {where}")
    wanted = {Point(plan.setting, variant).key for plan in plans for variant in plan.variants}
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=len(wanted), completed=len(wanted & done.keys()), last="")

        def told(row: Row) -> None:
            progress.update(
                bar, advance=1, last=f"{row['model']} λ {row['rate']:g} r {row['training_rate']:g}"
            )

        for row in run_tasks(
            tasks_of(plans, done), journal, where=where, sources=sources, processes=processes, told=told
        ):
            done[key_of(row)] = row
        progress.update(bar, last="pictures")
        order = {
            Point(plan.setting, variant).key: number
            for number, (plan, variant) in enumerate((plan, one) for plan in plans for one in plan.variants)
        }
        rows = sorted((done[key] for key in wanted), key=lambda row: order[key_of(row)])
        summary = summary_of(name, rows, where=where, directory=directory, quick=options.quick)
        write_study(directory, summary, _close_ups(plans, runner))
    return summary


def _close_ups(plans: Sequence[Plan], runner: Runner) -> dict[str, CloseUp]:
    """One setting seen closely: of the middle rate, with about half of its items trained."""
    settings = list(dict.fromkeys(plan.setting for plan in plans))
    rates = sorted({one.rate for one in settings})
    middle = rates[len(rates) // 2]

    def distance(one: Setting) -> tuple[float, ...]:
        return abs(one.rate - middle), abs(one.training_rate - 0.5), one.seed

    chosen = min(settings, key=distance)
    plan = next(plan for plan in plans if plan.setting == chosen)
    seen = {}
    for variant in plan.variants:
        if variant.label in _CLOSE_UPS or variant.split is not None:
            close_up = runner.close_up(Point(chosen, variant))
            if close_up is not None:
                place = f"{chosen.model}, λ {chosen.rate:g}, r {chosen.training_rate:g}"
                recording = replace(close_up.recording, title=f"{variant.label} · {place}")
                seen[variant.label] = replace(close_up, recording=recording)
    return seen


def _journal(directory: Path) -> Journal:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return Journal(directory)
    except OSError as error:
        raise BadInput(f"{directory}: no report can be written there ({error.strerror})") from None


def _table(summary: Mapping[str, Any]) -> Table:
    """What the preferences come to beside each other policy."""
    rows = summary["points"]
    table = Table(
        title=f"{summary['study']}: lemix ÷ others, goodput per node-second · per second",
        title_justify="left",
    )
    labels = labels_of(rows)
    ours = [label for label in labels if label.startswith("lemix ·")]
    for column in ("", *ours):
        table.add_column(column)
    for other in [label for label in labels if label not in ours]:
        cells = []
        for mine in ours:
            found = [
                geometric_mean(ratios(rows, mine, other, measure))
                for measure in ("goodput per node-second", "goodput per second")
            ]
            cells.append(" · ".join("–" if value is None else f"{value:.2f}" for value in found))
        table.add_row(other, *cells)
    table.caption = f"report in {summary['report_dir']}/report.md"
    return table


def _seeds(seed: int | None, seeds: str, repeats: int | None) -> tuple[int, ...]:
    if seeds and (seed is not None or repeats is not None):
        raise BadInput("give --seeds, or --seed and --repeats, not both")
    if seeds:
        first, dash, last = seeds.partition("-")
        try:
            if dash:
                return tuple(range(int(first), int(last) + 1))
            return tuple(int(one) for one in seeds.split(","))
        except ValueError:
            raise BadInput(f"--seeds {seeds}: give numbers by commas, or a range like 0-4") from None
    if seed is None and repeats is None:
        return ()
    return tuple((seed or 0) + number for number in range(repeats or 1))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _known_models(text: str) -> tuple[str, ...]:
    for model in (models := _words(text)):
        if model not in MODELS:
            raise BadInput(f"--models: there is no {model!r}; there are {', '.join(MODELS)}")
    return models


def _numbers(option: str, text: str, *, least: float, most: float) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in _words(text))
    except ValueError:
        raise BadInput(f"{option} {text}: give numbers by commas") from None
    for number in numbers:
        if not least < number <= most:
            raise BadInput(f"{option} {number:g}: must be above {max(least, 0):g} and at most {most:g}")
    return numbers


def _one_of(option: str, word: str, known: Sequence[str]) -> Any:
    if word and word not in known:
        raise BadInput(f"{option} {word}: use {', '.join(known)}")
    return cast("Literal['fifo']", word)
