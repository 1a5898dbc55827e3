"""Commands about items: score, generate, train, flush."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from lemix.answers import Generation
from lemix.cli import schedule_text
from lemix.cli.errors import clear_errors
from lemix.client import Client
from lemix.items import DEFAULT_NEW_TOKENS, GenerateItem, OverLongRule, ScoreItem, TrainItem, UpdateRule
from lemix.rows import read_rows
from lemix.urgency import PRIORITIES
from lemix_common.errors import BadInput
from lemix_common.sampling import Sampling, Stopping
from lemix_common.schedules import SCHEDULES

Url = Annotated[
    str | None, typer.Option("--url", help="The cluster's broker (default: LEMIX_URL, then .lemix).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds to wait (default: no limit).")]
Priority = Annotated[
    int,
    typer.Option(
        help=f"From {PRIORITIES[0]} to {PRIORITIES[-1]}, the higher first; a step is worth 5 s of waiting."
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option("--deadline", help="Seconds after which it fails, wherever it is (default: none)."),
]
OverLong = Annotated[str, typer.Option("--over-long", help=" | ".join(get_args(OverLongRule)))]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (score, generate, train, flush):
        app.command()(clear_errors(command))


def score(
    prompt: Annotated[str, typer.Argument(help="What comes before.")],
    reference: Annotated[str, typer.Argument(help="What is scored.")],
    *,
    priority: Priority = 0,
    deadline: Deadline = None,
    over_long: OverLong = "reject",
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Say how likely the model finds REFERENCE after PROMPT."""
    item = ScoreItem(prompt, reference, priority=priority, deadline_s=deadline, over_long=_rule(over_long))
    with Client(url) as client:
        future = client.submit(item)
        answer = future.result(timeout)
    if as_json:
        fields = {"item": future.item_id, "loss": answer.loss, "logprobs": answer.logprobs}
        _print(fields | _version(answer) | {"response_s": answer.response_s})
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
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens less likely than this share of the best; 0: none.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: less of what the text has already.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tokens.")] = 0,
    min_tokens: Annotated[int, typer.Option(help="No end before so many tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="Show what ended it.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end.")] = False,
    logprobs: Annotated[
        int,
        typer.Option(
            help="With --json: each token's log-probability, and those of so many likely ones; 0: none."
        ),
    ] = 0,
    n: Annotated[int | None, typer.Option(help="So many answers, each with the next seed.")] = None,
    on_update: Annotated[
        str | None,
        typer.Option(help="When newer weights are served: finish | rebuild (default: the cluster's)."),
    ] = None,
    priority: Priority = 0,
    deadline: Deadline = None,
    over_long: OverLong = "reject",
    timeout: Timeout = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Go on from PROMPT, shown as it comes."""
    if logprobs and not as_json:
        raise BadInput("--logprobs are shown with --json")
    item = GenerateItem(
        prompt,
        max_new_tokens,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            min_tokens=min_tokens,
            logprobs=logprobs,
            seed=seed,
        ),
        stopping=Stopping(
            stop_ids=tuple(stop_id or ()), stop_strings=tuple(stop or ()), include_stop=include_stop
        ),
        ignore_eos=ignore_eos,
        on_update=cast("UpdateRule | None", on_update),
        priority=priority,
        deadline_s=deadline,
        over_long=_rule(over_long),
    )
    if n is not None:
        _generate_several(item, n, url=url, timeout=timeout, as_json=as_json)
        return
    with Client(url) as client, client.stream_item(item, timeout=timeout) as stream:
        for chunk in stream:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        answer: Generation = stream.future.result(0)
    if as_json:
        _print(_generation(stream.item_id, answer))
    else:
        typer.echo()


def _generate_several(
    item: GenerateItem, n: int, *, url: str | None, timeout: float | None, as_json: bool
) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    shown = []
    with Client(url) as client:
        for number, future in enumerate(client.submit_answers(item, n)):
            answer = future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            shown.append(_generation(future.item_id, answer))
            if not as_json:
                typer.echo(f"--- {number} ({answer.finish_reason})\n{answer.text}")
    if as_json:
        _print({"answers": shown})


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


def _generation(item_id: str, answer: Generation) -> dict[str, object]:
    fields: dict[str, object] = {
        "item": item_id,
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs:
        fields["logprobs"] = [entry._asdict() for entry in answer.logprobs]
    return fields | _version(answer) | _times(answer)


def _times(answer: Generation) -> dict[str, object]:
    return {
        "version_spans": answer.version_spans,
        "ttft_s": answer.ttft_s,
        "response_s": answer.response_s,
        "token_times_s": answer.token_times_s,
    }


def _print(answer: dict[str, object]) -> None:
    typer.echo(json.dumps(answer, ensure_ascii=False))
