"""`lemix plan`: how many nodes a load needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from lemix.cli.errors import clear_errors
from lemix_common.costs import Profile
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs
from lemix_studies.accelerators import MODELS, profile_of
from lemix_studies.traces import read_trace
from lemix_studies.wording import duration, share
from lemix_studies.workload import Task, WorkloadOptions

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(plan))


def plan(
    *,
    trace: Annotated[Path, typer.Option(help="Arrivals and lengths: Azure's .csv or Mooncake's .jsonl.")],
    slo: Annotated[
        str, typer.Option(help="What a score, or a generation's first token, may take: 2s, 500ms.")
    ],
    model: Annotated[str | None, typer.Option(help=f"{', '.join(MODELS)}.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="a100-80g or h100.")] = "a100-80g",
    stages: Annotated[int, typer.Option(help="Stages of a node, an accelerator each.")] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="A measured profile, instead of --model, --device and --stages.", show_default=False
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="The policy that opens and closes nodes.")] = "lemix",
    attainment: Annotated[float, typer.Option(help="Of the requests, what has to keep the SLO.")] = 0.99,
    minutes: Annotated[
        float | None, typer.Option(help="Of the trace (default: all of it).", show_default=False)
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Multiplies arrival times.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiplies numbers of tokens.")] = 1.0,
    train_every: Annotated[
        int, typer.Option(help="Each so many-th line is a training example; 0: none.")
    ] = 0,
    task: Annotated[str, typer.Option(help="What requests ask for: generate or score.")] = "generate",
    decode_batch: Annotated[int, typer.Option(help="Rows of an iteration, at most.")] = 16,
    seed: Annotated[int, typer.Option(help="Of arrivals that a trace rounds, and of the policy.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Say how many nodes a load needs, by simulating it; no cluster is asked or started."""
    configure_logs("plan", level="warning")
    from lemix_studies.planning import Target, load_of, plan_nodes

    slo_s = seconds_of(slo, "--slo")
    target = Target(slo_s=slo_s, attainment=attainment, policy=policy, decode_batch=decode_batch, seed=seed)
    options = WorkloadOptions(
        minutes=minutes,
        time_scale=time_scale,
        length_scale=length_scale,
        train_every=train_every,
        task=cast("Task", task),
        seed=seed,
    )
    costs = _profile(profile, model, device, stages)
    context_length = MODELS[costs.model].positions if costs.model in MODELS else None
    load = load_of(read_trace(trace, seed=seed), options, context_length=context_length)
    found = plan_nodes(
        costs,
        load,
        target,
        told=lambda line: typer.echo(f"simulating {line}", err=True),
    ).as_json()
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(_words(found))
    Console(width=100).print(_table(found))


def seconds_of(text: str, option: str) -> float:
    """Of ``2s``, ``500ms``, ``1.5``; `BadInput` for anything else, and for nothing."""
    matched = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|)", text.strip())
    value = float(matched[1]) * _UNITS[matched[2]] if matched else 0.0
    if value <= 0:
        raise BadInput(f"{option} {text}: must be a time above 0, such as 2s or 500ms")
    return value


def _profile(path: Path | None, model: str | None, device: str, stages: int) -> Profile:
    if (path is None) == (model is None):
        raise BadInput("give --model for a roofline, or --profile for what was measured")
    if path is not None:
        from lemix_common.profile_file import read_profile

        return read_profile(path)
    return profile_of(cast("str", model), device, stages)


def _words(found: dict[str, Any]) -> str:
    trained = f" and {found['training']} training examples" if found["training"] else ""
    capped = f", {found['capped']} of them shortened to the context" if found["capped"] else ""
    return (
        f"{found['requests']} requests{trained}{capped}; {found['model']} on {found['device']}, "
        f"{found['stages']} stage{'s' * (found['stages'] > 1)} a node; "
        f"{duration(found['slo_s'])} for {share(found['attainment'])}"
    )


def _table(found: dict[str, Any]) -> Table:
    table = Table()
    for name in ("", "nodes", "on average", "node-seconds", "in time", "p99"):
        table.add_column(name, justify="left" if not name else "right")
    for name, words in (("constant", "constant"), ("elastic", "opened and closed")):
        held = found[name]
        judged = held["ttft_s"] if held["ttft_s"]["p99"] is not None else held["response_s"]
        table.add_row(
            f"{words} ({held['policy']})",
            str(held["nodes"]),
            f"{held['nodes_mean']:.2f}",
            f"{held['node_seconds']:,.0f}",
            f"{100 * held['slo_attainment']:.2f} %",
            duration(judged["p99"]),
        )
    return table
