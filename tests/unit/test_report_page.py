from __future__ import annotations

import re
from base64 import b64encode
from typing import Any

import pytest

from lemix_studies.page import in_words, report_page
from lemix_studies.wording import amount, duration, share

SUMMARY: dict[str, Any] = {
    "submitted": 456,
    "done": 455,
    "items_per_second": 3.79,
    "response_s": {"p50": 0.405, "p95": 1.73, "p99": None},
    "slo_attainment": {"5": 0.851},
    "training_tax": 0.0121,
    "steps": 29,
    "exact_match": {"before": 0.1, "after": 0.75},
    "something_new": "<b>",
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (42e-6, "42 µs"),
        (0.0123, "12.3 ms"),
        (1.732, "1.73 s"),
        (119, "119 s"),
        (125, "2 min 5 s"),
    ],
)
def test_durations_have_units(seconds: float, text: str) -> None:
    """The one that fits."""
    assert duration(seconds) == text


@pytest.mark.parametrize(("part", "text"), [(0, "0 %"), (0.0121, "1.2 %"), (0.851, "85 %"), (1, "100 %")])
def test_shares_are_percentages(part: float, text: str) -> None:
    """Finer where they are small."""
    assert share(part) == text


@pytest.mark.parametrize(("value", "text"), [(29, "29"), (4.0, "4"), (3.7906, "3.79"), (12345.6, "12,346")])
def test_amounts_have_no_false_precision(value: float, text: str) -> None:
    """Whole numbers are whole."""
    assert amount(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("duration_s", 120.3, "2 min"),
        ("response_s", {"p50": 0.405, "p99": None}, "p50 405 ms · p99 –"),
        ("slo_attainment", {"1": 0.19, "5": 0.85}, "1 × idle 19 % · 5 × idle 85 %"),
        ("weights_sha256", {"0": "58b6"}, "0: 58b6"),
        ("weights_sha256", {}, "–"),
        ("weights_versions", [f"0.{number}" for number in range(30)], "0.0 0.1 … 0.29 (30)"),
        ("weights_versions", ["0.0", "0.1"], "0.0 0.1"),
        ("max_lateness_s", 0.035, "35 ms"),
        ("factors", {"time": 1.0, "length": 0.1}, "time 1 · length 0.1"),
    ],
)
def test_figures_are_read_by_their_names(name: str, value: object, text: str) -> None:
    """Seconds as durations, parts as shares, and nothing as a dash."""
    assert in_words(name, value) == text


def test_a_page_needs_nothing_else() -> None:
    """Pictures are in it, every figure too, and no address that a browser would fetch."""
    page = report_page(SUMMARY, {"loss.png": b"picture"}, title="a run", subtitle="2 nodes")
    assert f'src="data:image/png;base64,{b64encode(b"picture").decode()}"' in page
    assert all(f"<th>{name}</th>" in page for name in SUMMARY)
    assert "&lt;b&gt;" in page
    assert not re.search(
        r"(src|href)=.?(?!data:)\w+:|url\(|@import|<script|<link", page.replace("data:image", "data:")
    )


def test_a_page_begins_with_the_figures_that_matter() -> None:
    """Those of them that there are."""
    page = report_page(SUMMARY, {}, title="a run", note="Without pictures: so.")
    tiles = re.findall(r'class="tile"><b>(.*?)</b><span>(.*?)</span>', page)
    assert tiles == [
        ("455 of 456", "items done"),
        ("3.79", "items a second"),
        ("405 ms", "response, p50"),
        ("1.73 s", "response, p95"),
        ("85 %", "within 5 × idle"),
        ("1.2 %", "training tax"),
        ("29", "steps trained"),
        ("10 % → 75 %", "exact match"),
    ]
    assert '<p class="note">Without pictures: so.</p>' in page
