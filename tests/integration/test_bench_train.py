"""The bench `train` as a whole: a real cluster and its peer, quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemix_benchmarks import train
from lemix_benchmarks.report import Plan, ratio

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_both_learn_the_same_from_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every subject has a sample a round, the ratio follows from them, and the losses are equal up to rounding."""
    monkeypatch.setattr(train, "ROWS", tmp_path / "absent.jsonl")
    found = train.run(Plan(quick=True))
    assert [(row.case, row.subject, row.unit) for row in found.rows] == [
        ("fixed", "lemix", "tokens/s"),
        ("fixed", "torch_pipelining", "tokens/s"),
    ]
    assert all(len(row.samples) == found.rounds and min(row.samples) > 0 for row in found.rows)
    assert found.ratios == {"fixed": ratio(found.rows, "fixed", "lemix", "torch_pipelining")}
    difference = found.further["max_loss_difference"]
    assert isinstance(difference, float)
    assert difference < 1e-4
    assert {skipped.case for skipped in found.skipped} == {"gsm8k"}
