from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import structlog
import typer
from typer.testing import CliRunner

from lemix_common.errors import BadInput
from lemix_studies.accelerators import profile_of
from lemix_studies.plan_cli import register, seconds_of
from lemix_studies.planning import Target, load_of, most_at_once, plan_nodes
from lemix_studies.traces import TraceLine
from lemix_studies.workload import WorkloadOptions

PROFILE = profile_of("dialogpt-large", "a100-80g", 2)
SLO_S = 0.1
"""About eight times what a score of 200 tokens takes."""


def line_of(rate: float, count: int = 200) -> list[TraceLine]:
    """So many scores a second, evenly, of 200 tokens."""
    return [TraceLine(number / rate, 150, 50) for number in range(count)]


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("rate", [50, 500, 1000])
def test_the_fewest_nodes_keep_the_slo_and_one_less_does_not(rate: float) -> None:
    """A stage does about 180 such scores a second; no plan has a node too many."""
    load = load_of(line_of(rate), WorkloadOptions(task="score"), context_length=None)
    lines: list[str] = []
    plan = plan_nodes(PROFILE, load, Target(slo_s=SLO_S, policy="jsq"), told=lines.append)
    fewest = plan.constant.nodes
    assert plan.constant.slo_attainment >= 0.99
    assert (fewest > 1) == (rate > 200)
    assert fewest == 1 or f"jsq on {fewest - 1} node{'s' * (fewest > 2)}" in lines
    assert plan.constant.node_seconds == pytest.approx(fewest * plan.constant.duration_s)
    assert plan.elastic.nodes <= 2 * fewest


def test_an_impossible_slo_says_so() -> None:
    """Less than an idle node takes."""
    load = load_of(line_of(10, 20), WorkloadOptions(task="score"), context_length=None)
    with pytest.raises(BadInput, match=r"no number of nodes keeps 0\.001 s for 99 % of the requests"):
        plan_nodes(PROFILE, load, Target(slo_s=0.001))


def test_a_load_follows_the_rules_of_a_replay() -> None:
    """Every third line is trained; lengths are cut to the context and counted; times are scaled."""
    options = WorkloadOptions(train_every=3, time_scale=0.5)
    trace = [TraceLine(float(second), 2000 if second == 1 else 30, 10) for second in range(6)]
    load = load_of(trace, options, context_length=1024)
    assert [work.item for work in load.training] == ["line-0", "line-3"]
    assert [work.arrived_at for work in load.requests] == [0.5, 1.0, 2.0, 2.5]
    assert [(work.lengths, work.new_tokens) for work in load.requests][:2] == [((1014,), 10), ((30,), 10)]
    assert load.training[0].lengths == (40,)
    assert load.capped == 1


def test_most_at_once_counts_overlaps_only() -> None:
    """A node that lets go as another one is opened isn't two."""
    assert most_at_once([(0, 0.0, 9.0), (1, 1.0, 2.0), (2, 2.0, 3.0)]) == 2


def told(options: Mapping[str, str], *flags: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    app = typer.Typer()
    register(app)
    words = [word for pair in options.items() for word in pair]
    result = CliRunner().invoke(app, [*words, *flags])
    return result.exit_code, result.output


@pytest.fixture
def options(tmp_path: Path) -> dict[str, str]:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second:02d}.5,100,4\n" for second in range(20))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    return {"--trace": str(trace), "--model": "llama-2-7b", "--stages": "2", "--slo": "500ms"}


def test_the_command_answers_in_words_and_as_json(options: dict[str, str]) -> None:
    """One node does; what is simulated is told beside the answer."""
    status, words = told(options)
    assert status == 0
    assert "20 requests; llama-2-7b on a100-80g, 2 stages a node; 500 ms for 99 %" in words
    assert "constant (jsq)" in words
    status, text = told(options, "--json")
    plan = json.loads(text[text.index("{") :])
    assert plan["constant"]["nodes"] == 1
    assert plan["constant"]["slo_attainment"] == 1.0
    assert plan["elastic"]["policy"] == "lemix"
    assert set(plan) >= {"model", "device", "stages", "slo_s", "requests", "training", "capped"}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--slo", "soon", "--slo soon: must be a time above 0"),
        ("--slo", "0s", "must be a time above 0"),
        ("--model", "gpt-5", "no profile of model 'gpt-5'"),
        ("--device", "abacus", "no profile of device 'abacus'"),
        ("--policy", "best", "no policy 'best'"),
        ("--attainment", "1.5", "--attainment 1.5"),
        ("--trace", "nothing.csv", "can't be read"),
        ("--profile", "nothing.json", "give --model for a roofline, or --profile"),
        ("--train-every", "1", "no request in this load"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, str], option: str, value: str, says: str) -> None:
    """Status 2."""
    status, words = told({**options, option: value})
    assert (status, says in words) == (2, True), words


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("500ms", 0.5), ("1.5", 1.5), ("2 min", 120.0)])
def test_times_have_units(text: str, seconds: float) -> None:
    """Seconds where there is none."""
    assert seconds_of(text, "--slo") == seconds
