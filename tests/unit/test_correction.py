from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_coordinator.scheduling.correction import (
    Correction,
    Corrections,
    ResponseCorrections,
    corrected,
)

FORWARD, DECODE = Cost(base=0.005, token=0.0003, context=7e-8), Cost(base=0.007, token=0.0004, context=1e-6)
COSTS = StageCosts(
    forward=FORWARD,
    backward=Cost(0.02, 0.0006),
    decode=DECODE,
    optimizer_s=0.03,
    activation_bytes=Cost(token=1e4),
    kv_token_bytes=1e3,
    weight_bytes=1,
    training_bytes=3,
)
PROFILE = Profile(
    model="m", device="cpu", source="measured", stages=(COSTS, COSTS), hop=Cost(), memory_bytes=1, load_s=1
)


def noted(
    correction: Correction, count: int, *, extra: float, factor: float, noise: float = 0.0
) -> Correction:
    """As many passes of all sizes, each off by up to this share."""
    drawn = random.Random(0)
    for _ in range(count):
        predicted = drawn.choice([0.008, 0.02, 0.05, 0.15])
        measured = (extra + factor * predicted) * (1 + drawn.uniform(-noise, noise))
        correction = correction.noted(predicted, measured)
    return correction


def test_nothing_noted_changes_nothing() -> None:
    """A fresh correction's line is the profile's."""
    assert Correction().applied_to(FORWARD) == FORWARD
    assert Correction().quantile(0.95) == 1
    assert Corrections().applied_to(PROFILE).stages[0].decode == DECODE


def test_what_is_added_and_what_is_multiplied_are_told_apart() -> None:
    """Passes of several sizes say which of the two it is; after a hundred, both are known to a few percent."""
    known = noted(Correction(), 100, extra=0.003, factor=1.3, noise=0.05)
    for predicted in (0.008, 0.05, 0.15):
        assert known.of(predicted) == pytest.approx(0.003 + 1.3 * predicted, rel=0.05)
    line = known.applied_to(FORWARD)
    assert line.of(512, 512**2) == pytest.approx(known.of(FORWARD.of(512, 512**2)))


def test_a_drift_is_followed() -> None:
    """What was true a hundred passes ago is forgotten: a machine that got half as fast is one, soon."""
    before = noted(Correction(), 200, extra=0.0, factor=1.0)
    after = noted(before, 100, extra=0.0, factor=2.0)
    assert before.of(0.05) == pytest.approx(0.05, rel=0.01)
    assert after.of(0.05) == pytest.approx(0.1, rel=0.1)


def test_passes_that_are_all_alike_do_not_wind_it_up() -> None:
    """A thousand decodes of one size say what that size takes, and next to nothing wrong of others."""
    correction = Correction()
    for _ in range(1000):
        correction = correction.noted(0.01, 0.012)
    assert correction.of(0.01) == pytest.approx(0.012, rel=0.02)
    assert 0.1 < correction.of(0.1) < 0.125
    assert correction.noted(0.1, 0.1).of(0.01) == pytest.approx(0.012, rel=0.05)


def test_one_disturbed_pass_decides_nothing() -> None:
    """One that took fifty times as long counts as three times as long, but the quantiles know it."""
    known = noted(Correction(), 100, extra=0.0, factor=1.0)
    disturbed = known.noted(0.05, 2.5)
    assert disturbed.of(0.05) == pytest.approx(0.05, rel=0.1)
    assert disturbed.quantile(1) == pytest.approx(50, rel=0.01)
    assert disturbed.quantile(0.5) == pytest.approx(1, rel=0.01)


def test_quantiles_are_of_what_was_expected() -> None:
    """Once a constant factor is learned the ratios are about 1, and what is left of them is the noise."""
    known = noted(Correction(), 400, extra=0.0, factor=1.5, noise=0.2)
    assert known.quantile(0.5) == pytest.approx(1, abs=0.05)
    assert 1.1 < known.quantile(0.95) < 1.3


def span(cat: str, seconds: float, tokens: int, contexts: int, **more: object) -> dict[str, Any]:
    """As a worker reports it."""
    return {"node": 0, "stage": 1, "cat": cat, "item": "i", "start": 10.0, "end": 10.0 + seconds} | {
        "tokens": tokens,
        "contexts": contexts,
        **more,
    }


def test_decodes_are_expected_by_the_rows_that_are_computed() -> None:
    """Where rows are rounded, an iteration that takes what its rounded rows take corrects nothing."""
    stages = (replace(COSTS, row_steps=((64, 16),)),) * 2
    rounded = replace(PROFILE, stages=stages)
    spans = [
        span("decode", DECODE.of(16, 50 * rows), rows, 50 * rows, others=["j"] * (rows - 1))
        for rows in range(1, 17)
    ]
    assert corrected(rounded, spans).stages[1].decode.of(16, 500) == pytest.approx(DECODE.of(16, 500))


def test_what_responses_have_on_top_is_learned_of_each_situation() -> None:
    """A fixed time beside training; what a few unlucky ones wait doesn't move what most take."""
    drawn = random.Random(0)
    known = ResponseCorrections()
    for number in range(200):
        predicted_s = drawn.uniform(0.02, 0.2)
        unlucky = 2.0 if number % 6 == 0 else 1.0
        known = known.noted("score", True, predicted_s=predicted_s, measured_s=unlucky * (predicted_s + 0.03))
    assert known.of("score", True, 0.1) == pytest.approx(0.13, rel=0.1)
    assert known.of("score", False, 0.1) == known.of("generate", True, 0.1) == 0.1
    assert known.noted("score", False, predicted_s=0.0, measured_s=1.0) is known


def test_spans_correct_their_stage_and_kind_only() -> None:
    """Decodes of stage 1 that take twice as long change that line and no other."""
    spans = [span("decode", 2 * DECODE.of(1, context), 1, context) for context in range(20, 1000, 10)]
    found = corrected(PROFILE, spans)
    assert found.stages[1].decode.of(1, 500) == pytest.approx(2 * DECODE.of(1, 500), rel=0.1)
    assert found.stages[0] == Corrections().applied_to(PROFILE).stages[0]
    assert (found.stages[1].forward, found.stages[1].backward) == (COSTS.forward, COSTS.backward)


def test_a_trainings_forward_has_its_own_line() -> None:
    """It is a prompt's until it was measured."""
    spans = [span("training_forward", 1.5 * FORWARD.of(n, n * n), n, n * n) for n in range(16, 1000, 16)]
    found = corrected(PROFILE, spans).stages[1]
    assert found.forward == FORWARD
    assert found.forward_of(is_training=True).of(512, 512**2) == pytest.approx(
        1.5 * FORWARD.of(512, 512**2), rel=0.1
    )


@pytest.mark.parametrize(
    "useless",
    [
        span("idle_pipeline", 1.0, 1, 10),
        span("optimizer", 1.0, 0, 0),
        span("training_backward", 1.0, 0, 0),
        span("prefill", 1.0, 8, 64) | {"stage": 2},
        span("decode", 1.0, 33, 1000, others=["j"]),
        {"cat": "decode", "stage": 1, "start": 1.0, "end": 2.0},
    ],
)
def test_what_does_not_tell_is_left_out(useless: Mapping[str, Any]) -> None:
    """Interrupted passes, unknown kinds and stages, iterations of both kinds."""
    assert corrected(PROFILE, [useless]) == Corrections().applied_to(PROFILE)
