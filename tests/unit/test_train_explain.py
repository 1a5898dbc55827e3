"""`lemix train --explain` needs no cluster, no file and no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lemix.cli.items import register
from lemix_common.schedules import SCHEDULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def train(*arguments: str, columns: int = 120) -> Result:
    """Run the command where no cluster is."""
    app = typer.Typer()
    register(app)
    environment = {"LEMIX_URL": "redis://127.0.0.1:1", "COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["train", *arguments], env=environment)


def explained(*arguments: str) -> list[dict[str, Any]]:
    """Its answer as values."""
    schedules: list[dict[str, Any]] = json.loads(train("--explain", "--json", *arguments).stdout)["schedules"]
    return schedules


def test_a_schedule_is_drawn_with_what_it_costs() -> None:
    """Picture, bubble, activations, weights."""
    ran = train("--explain", "--schedule", "1f1b", "--stages", "2", "--microbatches", "3")
    assert ran.stdout == (
        """\
1f1b: 2 stages on 2 workers, 3 microbatches a step, 1 step

time     0  1  2  3  4  5  6  7  8  9  10 11
stage 0  F0 F1 .  .  B0--- F2 B1--- .  B2---
stage 1  .  F0 B0--- F1 B1--- F2 B2--- .  .

F forward, B backward, . idle
bubble: 25.0% of the workers' time
activations held at most: 2, 1 by stage
weights: a step begins when the one before is committed, on what that made
"""
    )


def test_a_pp_says_which_weights_its_steps_take() -> None:
    """And that a further step has no bubble."""
    lines = train(
        "--explain", "--schedule", "a-pp", "--stages", "2", "--microbatches", "2"
    ).stdout.splitlines()
    assert lines[0] == "a-pp: 2 stages on 2 workers, 2 microbatches a step, 3 steps"
    assert lines[-3] == "bubble: 14.3% of the workers' time, 0.0% of each further step's"
    assert lines[-1] == (
        "weights: one version old after the first step: "
        "F0 to F1 on version 0, F2 to F3 on version 0, F4 to F5 on version 1"
    )


def test_interleaved_says_what_a_worker_holds() -> None:
    """Since its stages share its memory."""
    lines = train("--explain", "--schedule", "interleaved", "--workers", "2").stdout.splitlines()
    assert lines[0] == "interleaved: 4 stages on 2 workers, 8 microbatches a step, 1 step"
    assert lines[-2] == "activations held at most: 4, 3, 2, 1 by stage; 5, 3 by worker"


def test_a_picture_fits_its_terminal() -> None:
    """Whatever its width."""
    for columns in (40, 80, 200):
        ran = train("--explain", "--schedule", "gpipe", columns=columns)
        pictures = [line for line in ran.stdout.splitlines() if line.startswith(("time", "stage"))]
        assert len(pictures) > 4
        assert max(map(len, pictures)) <= columns


def test_without_a_name_every_schedule_is_explained() -> None:
    """One that these numbers don't allow says why."""
    found = {each["schedule"]: each for each in explained("--stages", "3", "--microbatches", "2")}
    assert list(found) == ["s-pp", "gpipe", "1f1b", "interleaved", "zero-bubble", "a-pp"]
    assert [name for name, each in found.items() if "refused" in each] == ["interleaved", "a-pp"]
    text = train("--explain", "--stages", "3", "--microbatches", "2").stdout
    assert f"a-pp: {found['a-pp']['refused']}" in text


def test_json_has_the_orders() -> None:
    """And the figures as numbers."""
    (schedule,) = explained("--schedule", "zero-bubble", "--stages", "2", "--microbatches", "2")
    assert schedule["grid"].startswith("time ")
    assert {name: value for name, value in schedule.items() if name != "grid"} == {
        "schedule": "zero-bubble",
        "stages": 2,
        "workers": 2,
        "microbatches": 2,
        "steps": 1,
        "delay": 0,
        "bubble_share": pytest.approx(1 / 7),
        "bubble_share_of_a_further_step": pytest.approx(1 / 7),
        "activations_held_by_stage": [2, 2],
        "activations_held_by_worker": [2, 2],
        "orders": [
            ["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"],
            ["1F0", "1I0", "1F1", "1I1", "1W0", "1W1"],
        ],
    }


def test_docs_training_shows_every_schedule_as_it_is() -> None:
    """Below each command stands what it prints."""
    shown = re.findall(
        r"```console test\n\$ lemix train (--explain [^\n]*)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    assert {text.partition(":")[0] for _, text in shown} == set(SCHEDULES)
    for command, text in shown:
        assert train(*command.split()).stdout == text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--explain", "--schedule", "2f2b"], "there is no schedule '2f2b'"),
        (["--explain", "--schedule", "a-pp", "--microbatches", "2"], "2 on 4 stages can't be"),
        (["--explain", "--stages", "0"], "0 stages: there must be at least 1"),
        (["--explain", "--microbatches", "1000000000"], "too much for a picture"),
        (["--stages", "2"], "go with --explain"),
        (["rows.jsonl", "--schedule", "gpipe"], "go with --explain"),
        ([], "which FILE? (or --explain)"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(arguments: list[str], reason: str) -> None:
    """Nothing is left out in silence: options of the picture without --explain are refused."""
    ran = train(*arguments)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert reason in ran.stderr
    assert ran.stderr.count("\n") == 1
