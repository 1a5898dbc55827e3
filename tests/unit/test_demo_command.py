from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import typer
from rich.console import Console
from typer.testing import CliRunner

from lemix_studies.demo import demo_settings
from lemix_studies.demo_cli import demo_tables, introduction, register
from lemix_studies.demo_plan import DemoOptions

SUMMARY = {
    "submitted": 300,
    "done": 300,
    "items_per_second": 5.0,
    "response_s": {"p50": 0.05, "p95": 0.09, "p99": None},
    "slo_attainment": {"1": 0.4, "5": 0.99, "10": 1.0},
    "training_tax": 0.0,
    "serving_loss": {"before": 1.75, "after": None},
    "exact_match": {"before": 0.11, "after": 0.98},
    "exact_match_changed": {"before": 0.0, "after": 0.975},
    "exact_match_unchanged": {"before": 1.0, "after": 1.0},
    "answers": {"changed": 200, "unchanged": 25},
    "steps": 30,
    "weights_versions": ["0.0", "0.1", "0.30"],
    "weights_sha256": {"0": "abc", "1": "abc"},
    "report_dir": "demo-report",
}


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (("--policy", "sing"), "policy = sing: must be one of naive-mix, separate, random"),
        (("--report", "/proc/nowhere"), "/proc/nowhere: no report can be written there"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    wrong: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear line, status 2, before anything has started or been written."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, wrong)
    assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1)
    assert reason in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_tables_say_what_was_learned_and_what_it_cost() -> None:
    """First against last fifth, with the number of answers behind a share; a figure that isn't there is a dash."""
    console = Console(width=100)
    with console.capture() as captured:
        console.print(*demo_tables(SUMMARY))
    rows = [" ".join(line.replace("│", " ").split()) for line in captured.get().splitlines()]
    assert "exact match 11 % 98 %" in rows
    assert "of facts that changed (40 answers) 0 % 98 %" in rows
    assert "serving loss 1.750 –" in rows
    assert "versions served 3, 0.0 to 0.30" in rows
    assert "within SLO 40 % in 1 × idle, 99 % in 5 × idle, 100 % in 10 × idle" in rows


@pytest.mark.parametrize(
    ("has_training", "meanwhile"), [(True, "240 corrections arrive"), (False, "nobody corrects it")]
)
def test_the_introduction_says_what_will_be_seen(has_training: bool, meanwhile: str) -> None:
    """In numbers of this run."""
    options = DemoOptions(has_training=has_training)
    said = introduction(demo_settings(options, "random"), options)
    assert "24 facts of it have changed" in said
    assert "2 nodes of 3 stages (random)" in said
    assert meanwhile in said
