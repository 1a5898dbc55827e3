from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
import structlog
import typer
from typer.testing import CliRunner

from lemix_common.errors import BadInput
from lemix_studies import study_cli
from lemix_studies.accelerators import MODELS
from lemix_studies.experiments.arrivals import ALTERNATING, alternating, as_traced
from lemix_studies.experiments.journal import JOURNAL, Journal, Row, write_table
from lemix_studies.experiments.lengths import Row as Lengths
from lemix_studies.experiments.lengths import around_the_mean, drawn_lengths, ordered, read_lengths
from lemix_studies.experiments.matrix import STUDIES, Plan, StudyOptions, plans_of, policy_variants
from lemix_studies.experiments.on_simulator import SimulatorRunner
from lemix_studies.experiments.runners import CloseUp, runner_for
from lemix_studies.experiments.running import LIKE, run_task, run_tasks, tasks_of
from lemix_studies.experiments.settings import POLICIES, Point, Setting, Variant, key_of
from lemix_studies.experiments.tables import geometric_mean, ratios
from lemix_studies.experiments.targets import targets_of
from lemix_studies.experiments.workloads import Sources, workload_of

SOURCES = Sources(context_lengths={model: shape.positions for model, shape in MODELS.items()})
SETTING = Setting(
    study="spp-gpt", model="dialogpt-small", nodes=3, stages=2, rate=50, training_rate=0.5, items=12, rows=2
)


class Recorder:
    """The simulator's runner, noting what it is asked."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.points: list[Point] = []
        self._inner = SimulatorRunner(SOURCES)
        self._dies_after = dies_after

    def run(self, point: Point) -> Mapping[str, Any]:
        if len(self.points) == self._dies_after:
            raise KeyboardInterrupt
        self.points.append(point)
        return self._inner.run(point)

    def close_up(self, point: Point) -> CloseUp | None:
        return self._inner.close_up(point)

    def saturation(self, setting: Setting) -> float | None:
        return self._inner.saturation(setting)


def rows_of(*variants: Variant, setting: Setting = SETTING) -> list[Row]:
    (task,) = tasks_of([Plan(setting, variants)], {})
    return list(run_task(task, SimulatorRunner(SOURCES)))


def test_all_policies_get_the_same() -> None:
    """Every policy ends every item of one workload: as many requests and examples, the same SLO, the same bounds."""
    rows = rows_of(*policy_variants())
    assert {row["policy"] for row in rows} == set(POLICIES)
    for name in ("submitted", "done", "trained", "slo_base_s", "makespan_bound_s"):
        assert len({row[name] for row in rows}) == 1, name
    assert workload_of(SETTING, SOURCES) == workload_of(SETTING, SOURCES)


def test_a_workload_is_the_paper_s() -> None:
    """int((1 - r) · T) requests in order of arrival, the rest is trained; another seed is another workload."""
    workload = workload_of(replace(SETTING, training_rate=0.3, items=10), SOURCES)
    assert (len(workload.requests), len(workload.training)) == (7, 3)
    assert [work.arrived_at for work in workload.requests] == sorted(
        work.arrived_at for work in workload.requests
    )
    numbers = [work.number for work in (*workload.requests, *workload.training)]
    assert sorted(numbers) == list(range(10))
    assert workload_of(replace(SETTING, seed=1), SOURCES) != workload_of(SETTING, SOURCES)


def test_arrivals_do_not_depend_on_lengths() -> None:
    """Another order of lengths leaves times and kinds as they are."""
    plain, bursty = (
        workload_of(replace(SETTING, length_order=order), SOURCES) for order in ("random", "bursty")
    )
    assert [(work.item, work.arrived_at) for work in plain.requests] == [
        (work.item, work.arrived_at) for work in bursty.requests
    ]


@pytest.mark.parametrize("selection", ["random", "first", "last", "length", "adaptive"])
def test_selection_leaves_examples_out(selection: str) -> None:
    """What isn't selected is not trained, and is counted; requests stay."""
    setting = replace(SETTING, items=60, selection=selection)  # type: ignore[arg-type]
    workload, whole = workload_of(setting, SOURCES), workload_of(replace(SETTING, items=60), SOURCES)
    assert len(workload.training) + workload.unselected == len(whole.training)
    assert workload.unselected > 0
    assert workload.requests == whole.requests


def test_generations_ask_for_their_references() -> None:
    """A request of `generate` is one prompt, and as many new tokens as its reference has; examples keep their rows."""
    workload = workload_of(replace(SETTING, task="generate"), SOURCES)
    assert all(len(work.lengths) == 1 and work.new_tokens >= 1 for work in workload.requests)
    assert all(len(work.lengths) == SETTING.rows for work in workload.training)


def test_drawn_lengths_have_the_texts_means() -> None:
    """Within 5 % of HH-RLHF's 97.3 and 41.9 tokens."""
    rows = drawn_lengths(10_000, Random(0))
    assert fmean(row.query for row in rows) == pytest.approx(97.3, rel=0.05)
    assert fmean(row.reference for row in rows) == pytest.approx(41.9, rel=0.05)


def test_orders_of_lengths() -> None:
    """Ascending and descending are each other's reverse; bursty takes short and long ones by turns."""
    items = [(Lengths(tokens, 1),) for tokens in (5, 1, 4, 2, 3)]
    queries = {
        order: [rows[0].query for rows in ordered(items, order)]
        for order in ("random", "ascending", "descending", "bursty")
    }
    assert queries == {
        "random": [5, 1, 4, 2, 3],
        "ascending": [1, 2, 3, 4, 5],
        "descending": [5, 4, 3, 2, 1],
        "bursty": [1, 3, 2, 4, 5],
    }


def test_less_sigma_is_less_spread() -> None:
    """Rows taken around the mean spread as they are told to."""
    rows = drawn_lengths(2_000, Random(0))
    narrow, wide = (around_the_mean(rows, 200, sigma, Random(1)) for sigma in (10, 100))
    spreads = [max(row.tokens for row in some) - min(row.tokens for row in some) for some in (narrow, wide)]
    assert spreads[0] < spreads[1] / 3


def test_other_arrivals() -> None:
    """Alternating segments have all requests, at about the mean rate; a trace is scaled to it."""
    times = alternating(400, 20.0, Random(0))
    assert len(times) == 400
    assert 400 / times[-1] == pytest.approx(20.0, rel=0.2)
    assert len(ALTERNATING) == 12
    assert as_traced(3, 1.0, [5.0, 6.0, 8.0, 90.0]) == [0.0, 1.0, 3.0]
    with pytest.raises(BadInput, match="give a longer one"):
        as_traced(5, 1.0, [0.0])


def test_a_file_of_lengths_is_checked(tmp_path: Path) -> None:
    """A line that is none is named."""
    file = tmp_path / "lengths.csv"
    file.write_text("query_tokens,reference_tokens\n3,4\n5,x\n")
    with pytest.raises(BadInput, match=r"lengths\.csv:3: not two numbers"):
        read_lengths(file)
    file.write_text("query_tokens,reference_tokens\n3,4\n")
    assert read_lengths(file) == [Lengths(3, 4)]


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_points(study: str) -> None:
    """In full and quick; no point twice."""
    full, quick = (plans_of(study, StudyOptions(quick=is_quick)) for is_quick in (False, True))
    assert 0 < len(quick) < len(full)
    settings = [plan.setting for plan in full]
    assert len(settings) == len(set(settings))
    assert all(len(plan.variants) == len(set(plan.variants)) for plan in full)


def test_unknown_names_are_refused() -> None:
    """A study, a policy, a place to run: each by its name, in one sentence."""
    with pytest.raises(BadInput, match="no study is called 'main'"):
        plans_of("main", StudyOptions())
    with pytest.raises(BadInput, match="no policy is called 'best'"):
        plans_of("spp-gpt", StudyOptions(policies=("best",)))
    with pytest.raises(BadInput, match="--on nothing: use simulator"):
        runner_for("nothing", SOURCES)


def test_plus_runs_on_the_nodes_that_ours_used() -> None:
    """Also where ours was not asked for, and where its row is from an earlier run."""
    ours, kept = rows_of(LIKE, Variant(policy="naive-mix+"))
    assert kept["nodes_used"] <= ours["nodes_used"]
    assert kept["use_nodes"] is None
    (alone,) = rows_of(Variant(policy="naive-mix+"))
    (task,) = tasks_of([Plan(SETTING, (Variant(policy="naive-mix+"),))], {key_of(ours): ours})
    (later,) = run_task(task, SimulatorRunner(SOURCES))
    assert alone == kept == later


def test_a_study_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two points, and with half a line written, it runs the others only and has the same rows."""
    plans = [
        Plan(replace(SETTING, seed=seed), policy_variants(("jsq", "naive-mix+", "lemix"))) for seed in (0, 1)
    ]
    whole = {
        key_of(row): row for task in tasks_of(plans, {}) for row in run_task(task, SimulatorRunner(SOURCES))
    }
    first, second = Recorder(dies_after=7), Recorder()
    journal = Journal(tmp_path)

    def go_on(recorder: Recorder) -> dict[str, Row]:
        monkeypatch.setattr("lemix_studies.experiments.running.runner_for", lambda *_: recorder)
        done = journal.begin(resumes=True)
        for row in run_tasks(tasks_of(plans, done), journal, where="simulator", sources=SOURCES):
            done[key_of(row)] = row
        return done

    with pytest.raises(KeyboardInterrupt):
        go_on(first)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"study": "spp-g')
    found = go_on(second)
    assert {key: json.dumps(row) for key, row in found.items()} == {
        key: json.dumps({**row, "on": "simulator"}) for key, row in whole.items()
    }
    assert len(first.points) + len(second.points) == len(whole)
    assert not tasks_of(plans, journal.begin(resumes=True))


def test_a_foreign_journal_is_refused(tmp_path: Path) -> None:
    """A line that is no point names the file; without --resume the file is begun anew."""
    (tmp_path / JOURNAL).write_text('{"a": 1}\n')
    with pytest.raises(BadInput, match=r"points\.jsonl:1: not a point"):
        Journal(tmp_path).begin(resumes=True)
    assert Journal(tmp_path).begin(resumes=False) == {}


def test_a_report_of_another_kind_of_cluster_is_not_gone_on_with(tmp_path: Path) -> None:
    """Points of the simulator are not taken for those of emulated accelerators: it says so, and keeps them."""
    row = {**Point(SETTING, LIKE).values, "on": "simulator"}
    Journal(tmp_path).add([row])
    app = typer.Typer()
    app.callback()(lambda: None)
    study_cli.register(app)
    asked = ["study", "spp-gpt", "--on", "emulated", "--resume", "--report", str(tmp_path)]
    result = CliRunner().invoke(app, asked)
    structlog.reset_defaults()  # a command sets up logging for its own process
    assert result.exit_code == 2
    assert "has points of --on simulator" in result.stderr
    assert Journal(tmp_path).begin(resumes=True) == {key_of(row): row}


def test_the_table_is_tidy(tmp_path: Path) -> None:
    """A line a point, a column a figure."""
    rows = rows_of(LIKE, Variant(policy="jsq"))
    write_table(tmp_path, rows)
    with (tmp_path / "points.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["policy"] for line in lines] == ["lemix", "jsq"]
    assert float(lines[1]["response_s_p95"]) == rows[1]["response_s"]["p95"]


def test_ratios_are_of_equal_settings() -> None:
    """Ours ÷ theirs, setting by setting; the mean is geometric."""
    rows = rows_of(LIKE, Variant(policy="jsq"))
    (ratio,) = ratios(rows, "lemix · balanced", "jsq", "makespan (s)")
    assert ratio == pytest.approx(rows[0]["duration_s"] / rows[1]["duration_s"])
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([]) is None


def test_nothing_undercuts_the_bounds() -> None:
    """Every policy's makespan and node-seconds are at least what the items alone cost."""
    for row in rows_of(*policy_variants()):
        assert row["duration_s"] >= row["makespan_bound_s"] - 1e-9, row["policy"]
        assert row["node_seconds"] >= row["node_seconds_bound"] - 1e-9, row["policy"]


def test_targets_say_where_they_are_missed() -> None:
    """A makespan a tenth above the best baseline's misses `speed`'s target, at a named point."""
    ours, other = rows_of(Variant(policy="lemix", prefer="speed"), Variant(policy="jsq"))
    ours["duration_s"] = 1.1 * other["duration_s"]
    target = next(one for one in targets_of([ours, other]) if one.claim.startswith("makespan"))
    assert not target.is_met
    assert target.value == pytest.approx(1.1)
    assert target.worst == "dialogpt-small, λ 50, r 0.5, seed 0"
