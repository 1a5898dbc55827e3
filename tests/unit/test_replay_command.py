from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import typer
from typer.testing import CliRunner

from lemix_studies.cli import register

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"
TEXT = '{"question": "a", "answer": "b"}\n' * 9


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Options of a replay that could run, if there were a model or a cluster."""
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "text.jsonl").write_text(TEXT)
    return {
        "--trace": str(tmp_path / "trace.csv"),
        "--text": str(tmp_path / "text.jsonl"),
        "--report": str(tmp_path / "report"),
        "--url": "redis://127.0.0.1:1",
    }


def refusal(options: dict[str, str]) -> tuple[int, str]:
    """Exit status and error of a replay."""
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, [part for option in options.items() for part in option])
    return ran.exit_code, ran.stderr


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"--trace": "nothing.csv"}, "nothing.csv can't be read"),
        ({"--text": "nothing.jsonl"}, "nothing.jsonl can't be read"),
        ({"--task": "sing"}, "--task sing: use generate or score"),
        ({"--time-scale": "0"}, "--time-scale 0.0: must be a number above 0"),
        ({"--nodes": "2"}, "--nodes can only be given with --model"),
        ({"--keep-data": "here"}, "--keep-data can only be given with --model"),
        ({"--model": "nothing"}, "give --model to start a cluster, or --url to use one, not both"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    inputs: dict[str, str], wrong: dict[str, str], reason: str
) -> None:
    """One clear line, status 2, before anything has started or been written."""
    status, error = refusal(inputs | wrong)
    assert (status, error.count("\n")) == (2, 1)
    assert reason in error
    assert not Path(inputs["--report"]).exists()


def test_a_missing_model_is_refused_at_once(inputs: dict[str, str]) -> None:
    """Before a cluster is started for it."""
    del inputs["--url"]
    status, error = refusal(inputs | {"--model": "/nothing/here"})
    assert (status, error.startswith("lemix: /nothing/here: there is no such folder")) == (2, True)


def test_an_unreachable_cluster_is_no_bad_input(inputs: dict[str, str]) -> None:
    """The options were right: status 1."""
    status, error = refusal(inputs)
    assert (status, "no Redis or Valkey answers there" in error) == (1, True)
