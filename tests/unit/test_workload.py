from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix.items import GenerateItem, ScoreItem, TrainItem
from lemix_common.errors import BadInput
from lemix_studies.texts import Texts
from lemix_studies.traces import TraceLine
from lemix_studies.workload import PlannedArrival, WorkloadOptions, fit_lengths, plan_workload

TEXTS = Texts(trained=("abcdefgh", "ijklmnop"), held_out=("ABCDEFGH",))
TRACE = [TraceLine(10.0 * k, 100 + k, 10 + k) for k in range(12)]
OPTIONS = WorkloadOptions(minutes=1, time_scale=0.5, length_scale=0.1, train_every=4)


def plan(options: WorkloadOptions = OPTIONS, context_length: int = 512) -> list[PlannedArrival]:
    """The workload of the small trace, a letter a token."""
    return plan_workload(TRACE, TEXTS, lambda text: [*map(ord, text)], options, context_length=context_length)


def test_every_fourth_line_trains() -> None:
    """Lines are counted from 0; those within the minute are taken."""
    assert [arrival.kind for arrival in plan()] == ["train", *["generate"] * 3, "train", "generate"]


def test_without_training_every_line_is_a_request() -> None:
    """``--train-every 0``."""
    assert {arrival.kind for arrival in plan(replace(OPTIONS, train_every=0, task="score"))} == {"score"}


def test_times_and_lengths_are_scaled() -> None:
    """Half the time, a tenth of the tokens, at least one."""
    planned = plan()
    assert [arrival.at_s for arrival in planned] == [0, 5, 10, 15, 20, 25]
    assert [len(arrival.prompt) for arrival in planned] == [10] * 6
    assert [len(arrival.reference) for arrival in plan(replace(OPTIONS, length_scale=0.001))] == [1] * 6


def test_training_and_requests_use_different_text() -> None:
    """Requests are made of what is held out."""
    for arrival in plan():
        letters = "".join(map(chr, arrival.prompt + arrival.reference))
        assert letters.islower() == (arrival.kind == "train")


def test_windows_follow_each_other() -> None:
    """No token of the supply is used twice before all were used."""
    trained = [arrival for arrival in plan() if arrival.kind == "train"]
    tokens = [token for arrival in trained for token in arrival.prompt + arrival.reference]
    assert sorted(tokens[:16]) == sorted(map(ord, "abcdefghijklmnop"))


def test_the_seed_fixes_everything() -> None:
    """The same options give the same workload."""
    assert plan() == plan()
    assert any(plan(replace(OPTIONS, seed=seed)) != plan() for seed in range(1, 9))


def test_items_over_the_context_are_shortened_and_counted() -> None:
    """The prompt gives way first; what was shortened says so."""
    planned = plan(replace(OPTIONS, length_scale=1.0), context_length=112)
    assert [(len(a.prompt), len(a.reference), a.is_capped) for a in planned] == [
        (100, 10, False), (101, 11, False), (100, 12, True), (99, 13, True), (98, 14, True), (97, 15, True),
    ]  # fmt: skip


@settings(max_examples=50)
@given(prompt=st.integers(1, 99), reference=st.integers(1, 99), context=st.integers(2, 80))
def test_shortened_lengths_fit(prompt: int, reference: int, context: int) -> None:
    """Both are at least one token, nothing grows, and what fits is left alone."""
    fitted = fit_lengths(prompt, reference, context)
    assert 1 <= fitted[0] <= prompt
    assert 1 <= fitted[1] <= reference
    assert sum(fitted) == min(prompt + reference, context) or fitted[1] == context - 1
    assert sum(fitted) <= context


def test_a_request_generates_exactly_the_traces_tokens() -> None:
    """End of sequence is ignored; the id tells the line."""
    arrival = plan()[1]
    expected = GenerateItem(arrival.prompt, 1, ignore_eos=True, item_id="r-000001")
    assert arrival.item("r") == expected
    assert isinstance(plan()[0].item("r"), TrainItem)
    assert isinstance(plan(replace(OPTIONS, task="score"))[1].item("r"), ScoreItem)


@pytest.mark.parametrize(
    "wrong",
    [
        {"minutes": 0},
        {"time_scale": 0},
        {"time_scale": float("nan")},
        {"length_scale": -1},
        {"train_every": -1},
        {"task": "sing"},
    ],
)
def test_an_impossible_option_is_refused(wrong: dict[str, object]) -> None:
    """By its name on the command line."""
    with pytest.raises(BadInput, match="--" + next(iter(wrong)).replace("_", "-")):
        replace(OPTIONS, **wrong)  # type: ignore[arg-type]
