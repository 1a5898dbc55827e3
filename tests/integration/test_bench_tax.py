"""The bench `tax` as a whole: real clusters that serve and train, quick."""

from __future__ import annotations

import pytest

from lemix_benchmarks import tax
from lemix_benchmarks.report import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_every_case_is_measured_and_fifo_stands_beside() -> None:
    """A sample a round; who serves alone waits for no training, who does both trains too."""
    found = tax.run(Plan(quick=True))
    rows = {row.case: row for row in found.rows}
    assert list(rows) == ["training_only", "serving_only", "co_located", "co_located_fifo"]
    assert all(len(row.samples) == found.rounds and min(row.samples) > 0 for row in found.rows)
    assert rows["serving_only"].further["blocked_p99_s"] == 0
    assert "examples_per_second" not in rows["serving_only"].further
    assert rows["co_located"].further["examples_per_second"] > 0
    figures = ("ttft_p50", "ttft_p95", "ttft_p99", "itl_p95", "itl_p99", "training_share")
    assert set(found.ratios) == {f"{order}{name}" for order in ("", "fifo_") for name in figures}
    assert [target.name for target in found.targets] == [
        "itl_p99",
        "ttft_p95",
        "blocked_p99_s",
        "training_share",
    ]
