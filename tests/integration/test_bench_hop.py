from __future__ import annotations

import pytest

from lemix_benchmarks import hop
from lemix_benchmarks.report import Plan, ratio


@pytest.mark.timeout(60)
def test_a_quick_run_measures_every_case() -> None:
    """Every subject has a sample a round, the ratios follow from them, and the targets are there."""
    found = hop.run(Plan(quick=True))
    assert {(row.case, row.subject) for row in found.rows} == {
        ("shm_1kb", "lemix"), ("shm_1kb", "raw_unix"),
        ("shm_4mb", "lemix"), ("shm_4mb", "raw_unix"), ("shm_4mb", "memcpy"),
        ("unix_1kb", "lemix"), ("unix_1kb", "raw_unix"),
        ("unix_4mb", "lemix"), ("unix_4mb", "raw_unix"), ("unix_4mb", "memcpy"),
        ("stream_1kb", "lemix"), ("stream_1kb", "raw_stream"),
    }  # fmt: skip
    assert all(len(row.samples) == found.rounds >= 5 and min(row.samples) > 0 for row in found.rows)
    assert found.ratios["shm_4mb_over_memcpy"] == ratio(found.rows, "shm_4mb", "lemix", "memcpy")
    assert found.ratios["shm_1kb_over_raw_unix"] == ratio(found.rows, "shm_1kb", "lemix", "raw_unix")
    assert found.ratios["stream_over_raw_stream"] == ratio(found.rows, "stream_1kb", "lemix", "raw_stream")
    assert {target.name for target in found.targets} == {
        "shm_4mb_over_memcpy", "shm_1kb_over_raw_unix", "stream_over_raw_stream",
    }  # fmt: skip
    assert not found.skipped
