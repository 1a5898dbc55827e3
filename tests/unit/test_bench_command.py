from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog
import typer
from typer.testing import CliRunner, Result

from lemix_benchmarks import cli
from lemix_benchmarks.report import Findings, Plan, Row, Target


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def slow_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that misses its target."""

    def found(_name: str, _plan: Plan) -> Findings:
        return Findings(
            rounds=1,
            threads=1,
            model=None,
            rows=(
                Row("c", "lemix", (2e-3,)),
                Row("c", "peer", (1e-6,)),
                Row("d", "lemix", (1234.5,), unit="tokens/s"),
            ),
            ratios={"over": 2.0},
            targets=(Target("over", 2.0, "<=", 1.1),),
        )

    monkeypatch.setattr(cli, "run_bench", found)


def bench(*arguments: str) -> Result:
    app = typer.Typer()
    cli.register(app)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("name", cli.NOT_BUILT)
def test_a_bench_that_is_not_built_is_refused_by_name(name: str) -> None:
    """One sentence that says which there are, and the status of bad input."""
    result = bench(name)
    assert result.exit_code == 2
    assert result.stderr == (
        f"lemix: the bench '{name}' is not built yet; "
        "there are hop, prefill, train, decode, tax, scheduler, simulator\n"
    )


def test_an_unknown_bench_is_refused() -> None:
    """It isn't a promise either."""
    result = bench("speed")
    assert result.exit_code == 2
    assert "no bench is called 'speed'" in result.stderr


@pytest.mark.usefixtures("slow_peer")
def test_only_check_makes_a_missed_target_an_error() -> None:
    """Without it, a bench that ran has succeeded."""
    assert bench("hop").exit_code == 0
    result = bench("hop", "--check", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["targets"][0]["met"] is False


@pytest.mark.usefixtures("slow_peer")
def test_a_reader_gets_tables() -> None:
    """Figures in readable units, and whether each limit was kept."""
    shown = bench("hop").stdout
    assert all(text in shown for text in ("2.00 ms", "1.0 µs", "1,234.5 tokens/s", "<= 1.1", "no"))


def test_a_target_that_could_not_be_measured_is_shown_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no value, and a peer's Python may be named by the environment."""
    seen: list[str] = []

    def found(_name: str, plan: Plan) -> Findings:
        seen.append(plan.vllm_python)
        row = Row("c", "lemix", (1.0,), unit="tokens/s", further={"ttft_p50_s": 0.5})
        return Findings(
            rounds=1,
            threads=1,
            model=None,
            rows=(row,),
            ratios={},
            targets=(Target("over_peer", None, ">=", 1.2),),
        )

    monkeypatch.setattr(cli, "run_bench", found)
    monkeypatch.setenv(cli.VLLM_PYTHON, "/opt/vllm/bin/python")
    assert all(text in bench("decode").stdout for text in ("over_peer", "–", ">= 1.2", "no"))
    result = bench("decode", "--check", "--json")
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert (target["value"], target["met"]) == (None, False)
    assert json.loads(result.stdout)["rows"][0]["ttft_p50_s"] == 0.5
    assert set(seen) == {"/opt/vllm/bin/python"}
