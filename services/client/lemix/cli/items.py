"""Commands about items: score, generate, train, flush."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from lemix.answers import Generation
from lemix.cli import schedule_text
from lemix.cli.errors import clear_errors
from lemix.client import Client
from lemix.items import DEFAULT_NEW_TOKENS, GenerateItem, OverLongRule, ScoreItem, TrainItem, UpdateRule
from lemix.rows import read_rows
from lemix_common.errors import BadInput
from lemix_common.sampling import Sampling
from lemix_common.schedules import SCHEDULES

Url = Annotated[
    str | None, typer.Option("--url", help="The cluster's broker (default: LEMIX_URL, then .lemix).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds to wait (default: no limit).")]
OverLong = Annotated[str, typer.Option("--over-long", help=" | ".join(get_args(OverLongRule)))]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (score, generate, train, flush):
        app.command()(clear_errors(command))


def score(
    prompt: Annotated[str, typer.Argument(help="What comes before.")],
    reference: Annotated[str, typer.Argument(help="What is scored.")],
    over_long: OverLong = "reject",
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Say how likely the model finds REFERENCE after PROMPT."""
    item = ScoreItem(prompt, reference, over_long=_rule(over_long))
    with Client(url) as client:
        future = client.submit(item)
        answer = future.result(timeout)
    if as_json:
        _print({"item": future.item_id, "loss": answer.loss, "logprobs": answer.logprobs} | _version(answer))
    else:
        typer.echo(
            f"loss {answer.loss:.4f} over {len(answer.logprobs)} tokens (weights {answer.weights_version})"
        )


def generate(
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = DEFAULT_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among this many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the tokens of this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tokens.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end.")] = False,
    on_update: Annotated[
        str | None,
        typer.Option(help="When newer weights are served: finish | rebuild (default: the cluster's)."),
    ] = None,
    over_long: OverLong = "reject",
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Go on from PROMPT, shown as it comes."""
    item = GenerateItem(
        prompt,
        max_new_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        ignore_eos=ignore_eos,
        on_update=cast("UpdateRule | None", on_update),
        over_long=_rule(over_long),
    )
    with Client(url) as client, client.stream_item(item, timeout=timeout) as stream:
        for chunk in stream:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        answer: Generation = stream.future.result(0)
    if as_json:
        fields = {"text": answer.text, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
        _print({"item": stream.item_id} | fields | _version(answer) | {"version_spans": answer.version_spans})
    else:
        typer.echo()


def train(
    file: Annotated[
        Path | None, typer.Argument(help="JSONL with prompt and reference (or question and answer, …).")
    ] = None,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Flush, and wait until the served weights have it.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Train nothing: draw what the stages do. Needs no cluster.")
    ] = False,
    schedule: Annotated[
        str | None, typer.Option(help=f"Explain {', '.join(SCHEDULES)} (default: each).")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="Explain so many stages (default: 4).")] = None,
    microbatches: Annotated[
        int | None, typer.Option(help="Explain so many microbatches a step (default: 8).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Explain so many workers (default: one a stage; interleaved: half).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Explain so many steps (default: 1; a-pp: 3).")] = None,
    over_long: OverLong = "reject",
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue the rows of FILE as training examples; none, if one of them can't be used."""
    drawn = {
        "name": schedule,
        "stages": stages,
        "microbatches": microbatches,
        "workers": workers,
        "steps": steps,
    }
    given = {name: value for name, value in drawn.items() if value is not None}
    if explain:
        _explain(schedule_text.Subject(**cast("dict[str, Any]", given)), as_json=as_json)
        return
    if given:
        raise BadInput("--schedule, --stages, --microbatches, --workers and --steps go with --explain")
    if file is None:
        raise BadInput("which FILE? (or --explain)")
    rule = _rule(over_long)
    rows = read_rows(file)
    with Client(url) as client:
        queued = client.train_many(
            (TrainItem(row.prompt, row.reference, over_long=rule, where=row.where) for row in rows),
            timeout=timeout,
        )
        version = client.flush(timeout) if wait else None
    if as_json:
        _print({"rows": len(rows), "examples": len(queued), "weights_version": version})
    else:
        learned = (
            f"served weights are {version}" if version else "run `lemix flush` to have the last step taken"
        )
        typer.echo(f"{len(queued)} examples queued from {len(rows)} rows; {learned}")


def _explain(subject: schedule_text.Subject, *, as_json: bool) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    typer.echo(schedule_text.as_json(subject) if as_json else schedule_text.as_text(subject, width=width))


def flush(timeout: Timeout = None, url: Url = None, as_json: AsJson = False) -> None:
    """Wait until everything queued for training is in the served weights."""
    with Client(url) as client:
        version = client.flush(timeout)
    if as_json:
        _print({"weights_version": version})
    else:
        typer.echo(f"served weights are {version}")


def _rule(text: str) -> OverLongRule:
    if text not in get_args(OverLongRule):
        raise BadInput(f"--over-long {text}: use {', '.join(get_args(OverLongRule))}")
    return cast("OverLongRule", text)


def _version(answer: Any) -> dict[str, object]:
    return {"weights_version": answer.weights_version}


def _print(answer: dict[str, object]) -> None:
    typer.echo(json.dumps(answer, ensure_ascii=False))
