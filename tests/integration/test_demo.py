"""The demo as a newcomer runs it: real processes, a minute of questions, and what its report promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILES = (
    "summary.json items.csv history.jsonl steps.jsonl trace.json timeline.png loss.png latency.png report.html"
).split()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def run_demo(folder: Path, *options: str) -> dict[str, Any]:
    """The summary of a demo; its progress goes elsewhere."""
    ended = subprocess.run(
        [sys.executable, "-m", "lemix", "demo", "--json", "--report", str(folder / "report"), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    summary: dict[str, Any] = json.loads(ended.stdout)
    return summary


def check_items(summary: dict[str, Any], report: Path) -> None:
    """Every item is done once, and the files of a report are there."""
    assert summary["done"] == summary["submitted"]
    assert [summary[name] for name in ("failed", "lost", "duplicated", "dead_lettered")] == [0] * 4
    events = [json.loads(line) for line in (report / "history.jsonl").read_text("utf-8").splitlines()]
    assert Counter(event["event"] for event in events)["done"] == summary["done"]
    assert [name for name in FILES if not (report / name).is_file()] == []
    assert len(summary["weights_sha256"]) == 2
    assert len(set(summary["weights_sha256"].values())) == 1


def test_the_model_learns_while_it_serves(tmp_path: Path) -> None:
    """Exact match, on paraphrases that no training item has, from 20 % or less to 60 % or more; nodes end equal."""
    summary = run_demo(tmp_path, "--seed", "0")
    check_items(summary, tmp_path / "report")
    assert summary["exact_match"]["before"] <= 0.2
    assert summary["exact_match"]["after"] >= 0.6
    assert summary["serving_loss"]["after"] < summary["serving_loss"]["before"] / 2
    assert summary["exact_match_unchanged"]["after"] >= 0.6
    steps = [json.loads(line) for line in (tmp_path / "report" / "steps.jsonl").read_text().splitlines()]
    assert len({item for step in steps for item in step["items"]}) == 240
    assert len(summary["weights_versions"]) > 10


def test_without_training_nothing_changes(tmp_path: Path) -> None:
    """The same questions, and no correction: exact match stays within five points, and one version serves."""
    summary = run_demo(tmp_path, "--no-train")
    check_items(summary, tmp_path / "report")
    assert abs(summary["exact_match"]["after"] - summary["exact_match"]["before"]) <= 0.05
    assert (summary["weights_versions"], summary["steps"]) == (["0.0"], 0)
