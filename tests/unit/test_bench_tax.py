from __future__ import annotations

import pytest

from lemix_benchmarks.decoding import Answer
from lemix_benchmarks.report import Findings, Row
from lemix_benchmarks.tax import CO_LOCATED, CO_LOCATED_FIFO, SERVING_ONLY, TRAINING_ONLY, Case, findings
from lemix_benchmarks.tenants import Measured, measured
from lemix_studies.spans import Span


def span(
    cat: str, start: float, end: float, *, stage: int = 0, item: str = "i", blocked_s: float = 0.0
) -> Span:
    return {"stage": stage, "cat": cat, "item": item, "start": start, "end": end, "blocked_s": blocked_s}


def served(
    *, ttft_s: float, itl_s: float, share: float = 0.5, rate: float = 0.0, blocked_s: float = 0.0
) -> Measured:
    return Measured(
        ttfts_s=(ttft_s,),
        itls_s=(itl_s,),
        serving_share=share,
        examples_per_second=rate,
        blocked_s=(blocked_s,),
    )


def found_of(both: list[Measured]) -> Findings:
    """Beside two rounds of serving alone with 20 ms between tokens, and of training alone with 10 examples a second."""
    return findings(
        {
            TRAINING_ONLY: [Measured(examples_per_second=10.0, backwards_s=(0.04, 0.06, 0.08))] * 2,
            SERVING_ONLY: [served(ttft_s=0.1, itl_s=0.02)] * 2,
            CO_LOCATED: both,
            CO_LOCATED_FIFO: [served(ttft_s=0.4, itl_s=0.2, rate=8.0, blocked_s=0.3)] * 2,
        },
        [Row(SERVING_ONLY, "lemix", (0.02, 0.02))],
        layers=4,
        max_block_s=0.02,
        capacity=6.0,
    )


def test_a_window_holds_what_lies_in_it() -> None:
    """Serving's share is of both stages' time; an example counts once, in however many pieces it came back."""
    spans = [
        span("prefill", 0.0, 1.5),  # begins before
        span("decode", 1.0, 2.0, blocked_s=0.01),
        span("prefill", 3.0, 4.0, stage=1, blocked_s=0.02),
        span("training_backward", 2.0, 2.25, item="main:1:0"),
        span("training_backward", 2.5, 2.75, item="main:1:0"),
        span("training_backward", 4.0, 4.25, item="main:1:1"),
        span("training_backward", 4.0, 4.5, item="main:1:0", stage=1),
        span("training_forward", 4.5, 5.0, item="main:1:2"),
        span("decode", 4.75, 5.25),  # ends after
    ]
    answers = [Answer(0, 1.0, (5, 5, 5), (1.5, 1.75, 2.5))]
    found = measured(spans, (1.0, 5.0), answers, stages=2)
    assert found.serving_share == 2.0 / 8.0
    assert found.blocked_s == (0.01, 0.02)
    assert found.backwards_s == (0.5, 0.25)
    assert found.examples_per_second == 2 / 4.0
    assert (found.ttfts_s, found.itls_s) == ((0.5,), (0.25, 0.75))


def test_ratios_are_medians_over_the_rounds() -> None:
    """Of what serving left, half of the time, training alone would have made 5 examples a second."""
    found = found_of(
        [
            served(ttft_s=0.1, itl_s=0.04, rate=4.0),
            served(ttft_s=0.2, itl_s=0.06, rate=5.0),
        ]
    )
    assert found.ratios["ttft_p95"] == pytest.approx(1.5)
    assert found.ratios["itl_p99"] == pytest.approx(2.5)
    assert found.ratios["training_share"] == pytest.approx(0.9)
    assert found.ratios["fifo_itl_p99"] == pytest.approx(10.0)
    assert found.ratios["fifo_training_share"] == pytest.approx(1.6)
    assert found.further["fifo_blocked_p99_s"] == 0.3


def test_the_targets_are_those_of_the_issue() -> None:
    """Gaps may grow by one and a half blocks; a step waits for a block and what can't be cut, a layer's backward."""
    both = served(ttft_s=0.12, itl_s=0.05, rate=3.5, blocked_s=0.035)
    found = found_of([both, both])
    assert [(each.name, each.op) for each in found.targets] == [
        ("itl_p99", "<="),
        ("ttft_p95", "<="),
        ("blocked_p99_s", "<="),
        ("training_share", ">="),
    ]
    assert [each.limit for each in found.targets] == pytest.approx([2.5, 1.25, 0.035, 0.7])
    assert [each.value for each in found.targets] == pytest.approx([2.5, 1.2, 0.035, 0.7])
    assert found.further["layer_backward_s"] == 0.015
    slower = served(ttft_s=0.13, itl_s=0.051, rate=3.4, blocked_s=0.036)
    assert not any(target.is_met for target in found_of([slower, slower]).targets)


def test_a_row_has_a_sample_a_round_and_the_rounds_medians_beside_them() -> None:
    """Requests are timed, training alone is counted."""
    rounds = [served(ttft_s=0.1, itl_s=0.02, rate=4.0), served(ttft_s=0.3, itl_s=0.04, rate=6.0)]
    case = Case(CO_LOCATED, lambda number: rounds[number])
    subject = case.subject()
    samples = (subject.once(), subject.once())
    assert samples == (0.02, 0.04)
    row = case.row(Row(CO_LOCATED, "lemix", samples)).to_json()
    assert row["ttft_p50_s"] == 0.2
    assert row["examples_per_second"] == 5.0
    alone = Case(TRAINING_ONLY, lambda _: Measured(examples_per_second=7.0), unit="examples/s")
    assert alone.subject().once() == 7.0
    assert alone.row(Row(TRAINING_ONLY, "lemix", (7.0,))).further == {"examples_per_second": 7.0}
