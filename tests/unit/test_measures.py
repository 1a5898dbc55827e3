from __future__ import annotations

import pytest

from lemix_studies.history import EventName, HistoryEvent
from lemix_studies.measures import (
    IdleTimes,
    ItemTimes,
    before_and_after,
    count_duplicated,
    count_lost,
    items_of,
    percentile,
    prediction_error,
    summarize,
    within_slo,
)

IDLE = IdleTimes(slo_base_s=1.0, ttft_s=0.5, itl_s=0.1)


def told(*events: tuple[float, EventName, str], kind: str = "generate") -> dict[str, ItemTimes]:
    """Items of some events; a token's index follows its colon (``a:0``)."""
    return items_of(
        HistoryEvent(
            t=t,
            client="c",
            event=event,
            item=item.partition(":")[0],
            kind=kind,
            index=int(item.partition(":")[2]) if event == "token" else None,
            weights_version="0.3" if event == "done" else None,
        )
        for t, event, item in events
    )


def test_times_are_the_clients() -> None:
    """Response to the end, first token, and gaps between tokens."""
    item = told((1, "submitted", "a"), (2, "token", "a:0"), (5, "token", "a:1"), (6, "done", "a"))["a"]
    assert (item.response_s, item.ttft_s, item.gaps_s, item.weights_version) == (5, 1, [3], "0.3")


def test_a_prediction_is_off_by_a_share_of_the_response() -> None:
    """Either way; requests without a prediction, or without an end, aren't counted."""
    items = told(
        (0, "submitted", "a"),
        (4, "done", "a"),
        (0, "submitted", "b"),
        (4, "done", "b"),
        (0, "submitted", "c"),
    )
    items["a"].predicted_end = 5.0
    assert [prediction_error(item) for item in items.values()] == [0.25, None, None]
    found = summarize(list(items.values()), IDLE, nodes=1, blocked_s={})["prediction_error"]
    assert found == {"p50": 0.25, "p95": 0.25, "p99": 0.25}


def test_an_accepted_item_without_an_end_is_lost() -> None:
    """One that was refused isn't."""
    items = told((0, "accepted", "a"), (0, "refused", "b"), (0, "accepted", "c"), (1, "failed", "c"))
    assert count_lost(items.values(), {}) == 1


def test_a_missing_token_is_lost() -> None:
    """Done, but not every token was seen."""
    items = told((0, "accepted", "a"), (1, "token", "a:0"), (1, "token", "a:2"), (2, "done", "a"))
    assert count_lost(items.values(), {"a": 3}) == 1
    assert count_duplicated(items.values(), []) == 0


@pytest.mark.parametrize(
    "events",
    [
        [(0, "done", "a"), (1, "done", "a")],
        [(0, "done", "a"), (1, "failed", "a")],
        [(0, "token", "a:0"), (1, "token", "a:0"), (2, "done", "a")],
    ],
)
def test_what_happens_twice_is_counted(events: list[tuple[float, EventName, str]]) -> None:
    """Two ends, or a token twice."""
    assert count_duplicated(told(*events).values(), []) == 1


def test_an_example_in_two_steps_is_counted() -> None:
    """Once, however it came about."""
    assert count_duplicated([], [["a", "b"], ["b", "c"]]) == 1


def test_a_generation_must_be_prompt_in_both_ways() -> None:
    """First token and mean gap within the factor of their idle values."""
    events: list[tuple[float, EventName, str]] = [
        (0, "submitted", "a"), (0.6, "token", "a:0"), (0.9, "token", "a:1"), (1, "done", "a")
    ]  # fmt: skip
    item = told(*events)["a"]
    assert not within_slo(item, IDLE, 2)
    assert within_slo(item, IDLE, 3.1)


def test_what_did_not_end_well_misses_its_slo() -> None:
    """A failure is a miss, however quick; so is a refusal."""
    quick = told((0, "submitted", "a"), (0.01, "failed", "a"), kind="score")["a"]
    assert not within_slo(quick, IDLE, 10)


def test_a_summary_counts_what_it_was_told() -> None:
    """Training counts in rates, requests in times."""
    items = told((0, "submitted", "a"), (0, "accepted", "a"), (2, "done", "a"), kind="score")
    items |= told((1, "submitted", "t"), (1, "accepted", "t"), (4, "done", "t"), kind="train")
    items |= told((3, "submitted", "r"), (3, "refused", "r"), kind="score")
    summary = summarize(list(items.values()), IDLE, nodes=2, blocked_s={"a": 1.0})
    expected = {
        "submitted": 3, "done": 2, "refused": 1, "failed": 0, "duration_s": 4, "node_seconds": 8,
        "items_per_second": 0.5, "items_per_node_second": 0.25, "goodput_per_second": 0.5,
        "slo_attainment": {"1": 0.0, "5": 0.5, "10": 0.5}, "training_tax": 1.0, "weights_versions": ["0.3"],
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected


def test_percentiles_lie_between_values() -> None:
    """Linear, and exact at the ends."""
    assert [percentile([1.0, 2.0, 3.0], percent) for percent in (0, 50, 75, 100)] == [1, 2, 2.5, 3]
    assert percentile([4.0], 99) == 4


def test_before_and_after_are_fifths() -> None:
    """The first and the last, of at least one value."""
    assert before_and_after([*map(float, range(10))]) == {"before": 0.5, "after": 8.5}
    assert before_and_after([3.0]) == {"before": 3.0, "after": 3.0}
    assert before_and_after([]) == {"before": None, "after": None}
