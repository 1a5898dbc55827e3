from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from lemix_benchmarks.report import (
    Findings,
    Plan,
    Row,
    Skipped,
    Subject,
    Target,
    measure,
    percentile_99,
    ratio,
    report,
)

ROWS = (
    Row("c", "lemix", (3.0, 8.0, 10.0)),
    Row("c", "peer", (1.0, 4.0, 10.0)),
    Row("other", "lemix", (9.0, 9.0, 9.0)),
)
FINDINGS = Findings(
    rounds=3,
    threads=1,
    model="bench-34m",
    rows=ROWS,
    ratios={"lemix_over_peer": 2.0},
    targets=(Target("lemix_over_peer", 2.0, "<=", 1.5),),
    skipped=(Skipped("c", "gpu", "there is none"),),
    further={"padding_share": 0.25},
)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Not the ratio of the medians, which here would be the same as in no round."""
    assert ratio(ROWS, "c", "lemix", "peer") == 2.0
    assert ratio(ROWS, "c", "peer", "lemix") == 0.5


def test_rounds_interleave_and_turn_round() -> None:
    """Every round measures everybody, and who goes first in one goes last in the next."""
    calls: list[str] = []

    def subject(name: str, times: Iterator[int]) -> Subject:
        def once() -> float:
            calls.append(name)
            return float(next(times))

        return Subject("c", name, once, repetitions=3)

    rows = measure([subject("a", iter(range(10))), subject("b", iter(range(10, 20)))], rounds=2, warm_ups=1)
    assert "".join(calls) == "ab" + "aaabbb" + "bbbaaa"
    assert [(row.subject, row.samples) for row in rows] == [("a", (2.0, 5.0)), ("b", (12.0, 15.0))]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([7.0], 7.0), ([1.0, 2.0], 1.99), ([float(i) for i in range(101)], 99.0)],
)
def test_p99_lies_between_the_nearest_samples(samples: list[float], expected: float) -> None:
    """As numpy.percentile has it."""
    assert percentile_99(samples) == pytest.approx(expected)


def test_a_target_keeps_its_limit_or_misses_it() -> None:
    """At the limit it is met."""
    assert Target("t", 1.5, "<=", 1.5).is_met
    assert not Target("t", 1.51, "<=", 1.5).is_met
    assert Target("t", 1.5, ">=", 1.5).is_met
    assert not FINDINGS.met_all_targets


def test_the_report_has_the_documented_fields() -> None:
    """`lemix bench NAME --json` prints this object; a bench's own fields come after the common ones."""
    started_at = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
    found = report("hop", Plan(seed=3, quick=True), FINDINGS, started_at=started_at)
    assert list(found) == [
        "schema", "bench", "version", "commit", "modified", "started_at", "seed", "quick", "rounds", "device",
        "threads", "model", "rows", "ratios", "targets", "skipped", "padding_share",
    ]  # fmt: skip
    assert (found["bench"], found["seed"], found["quick"], found["rounds"]) == ("hop", 3, True, 3)
    assert found["started_at"] == "2026-11-23T10:00:00+00:00"
    assert found["ratios"] == {"lemix_over_peer": 2.0}
    assert found["targets"] == [
        {"name": "lemix_over_peer", "value": 2.0, "op": "<=", "limit": 1.5, "met": False}
    ]
    assert found["skipped"] == [{"case": "c", "subject": "gpu", "reason": "there is none"}]
    assert isinstance(found["rows"], list)
    assert found["rows"][0] == {
        "case": "c", "subject": "lemix", "unit": "s", "samples": [3.0, 8.0, 10.0], "median": 8.0,
        "p99": pytest.approx(9.96),
    }  # fmt: skip
