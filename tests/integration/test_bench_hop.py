from __future__ import annotations

import pytest

from lemix_benchmarks import hop
from lemix_benchmarks.report import Plan, ratio


@pytest.mark.timeout(60)
def test_a_quick_run_measures_every_case() -> None:
    """Every subject has a sample a round, the ratios follow from them, and what isn't built says so."""
    found = hop.run(Plan(quick=True))
    assert {(row.case, row.subject) for row in found.rows} == {
        ("unix_1kb", "lemix"), ("unix_1kb", "raw_unix"),
        ("unix_4mb", "lemix"), ("unix_4mb", "raw_unix"), ("unix_4mb", "memcpy"),
        ("stream_1kb", "lemix"), ("stream_1kb", "raw_stream"),
    }  # fmt: skip
    assert all(len(row.samples) == found.rounds >= 5 and min(row.samples) > 0 for row in found.rows)
    assert found.ratios["stream_over_raw_stream"] == ratio(found.rows, "stream_1kb", "lemix", "raw_stream")
    assert [target.name for target in found.targets] == ["stream_over_raw_stream"]
    assert {skipped.case for skipped in found.skipped} == {"shm_1kb", "shm_4mb"}
