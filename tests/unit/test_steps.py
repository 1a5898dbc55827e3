from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.settings import ClusterSettings
from lemix_coordinator.steps import (
    QueuedExample,
    cut_examples,
    entry_order,
    learning_rate_at,
    plan_next_step,
    shards_of,
    weights_of,
)

SETTINGS = ClusterSettings(model="m", step_examples=3, virtual_shards=2)


def queue(count: int, first: int = 0) -> list[QueuedExample]:
    """Examples in submission order, with entries as Redis names them."""
    return [
        QueuedExample(f"{1000 + index // 4}-{index % 4}", f"item-{index}", 5 + index % 7, 1 + index % 7)
        for index in range(first, first + count)
    ]


def plan_all(
    count: int, batches: list[int], flushed_at: Collection[int], settings: ClusterSettings
) -> list[tuple[str, ...]]:
    """Plan as a coordinator does that sees the examples arrive in batches, each flush with those before it."""
    everything, steps, planned = queue(count), list[tuple[str, ...]](), 0
    seen = 0
    for batch in (*batches, count):
        seen = min(count, seen + batch)
        flushes = [everything[at - 1].entry for at in sorted(flushed_at) if at <= seen]
        while step := plan_next_step(
            everything[planned:seen][: settings.step_examples],
            settings,
            run="main",
            step=len(steps) + 1,
            flushes=flushes,
        ):
            steps.append(step[0].items)
            planned += len(step[0].items)
            assert step[1] == everything[planned - 1].entry
    return steps


@given(st.integers(0, 40), st.lists(st.integers(0, 9), max_size=8))
def test_steps_do_not_depend_on_when_examples_arrive(count: int, batches: list[int]) -> None:
    """One by one or all at once: the same cuts, in submission order, full steps only."""
    steps = plan_all(count, batches, (), SETTINGS)
    assert steps == plan_all(count, [], (), SETTINGS)
    assert [item for step in steps for item in step] == [f"item-{i}" for i in range(count - count % 3)]
    assert all(len(step) == 3 for step in steps)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_flush_cuts_exactly_where_it_was_asked_for(count: int, flush_at: int) -> None:
    """Everything up to the flush is planned, the last step of it smaller; what follows begins a new step."""
    flush_at = min(flush_at, count)
    steps = plan_all(count, [flush_at], {flush_at}, SETTINGS)
    ends = [sum(map(len, steps[: k + 1])) for k in range(len(steps))]
    assert flush_at in ends
    assert all(len(step) == 3 for step, end in zip(steps, ends, strict=True) if end != flush_at)


@given(st.integers(1, 40), st.sets(st.integers(1, 40)), st.lists(st.integers(0, 9), max_size=8))
def test_flushes_cut_alike_however_late_they_are_seen(
    count: int, flushed_at: set[int], batches: list[int]
) -> None:
    """A planner that was away while there were several makes the steps of one that saw each at once."""
    at = {min(flush, count) for flush in flushed_at}
    in_time = plan_all(count, [b - a for a, b in pairwise([0, *sorted(at)])], at, SETTINGS)
    assert plan_all(count, [], at, SETTINGS) == in_time
    assert plan_all(count, batches, at, SETTINGS) == in_time


def test_a_step_is_made_of_settings_and_examples_only() -> None:
    """Every field of a planned step."""
    planned = plan_next_step(queue(5), SETTINGS, run="main", step=7, flushes=())
    assert planned is not None
    step, cursor = planned
    assert cursor == "1000-2"
    assert (step.run, step.step, step.items, step.shards) == (
        "main",
        7,
        ("item-0", "item-1", "item-2"),
        (0, 0, 1),
    )
    assert (step.reference_tokens, step.learning_rate, step.weight_decay, step.seed) == (
        6,
        SETTINGS.learning_rate,
        SETTINGS.weight_decay,
        SETTINGS.seed,
    )


@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_too_few_examples_wait(waiting: int) -> None:
    """Without a flush, and with one of older examples only."""
    assert plan_next_step(queue(waiting), SETTINGS, run="main", step=1, flushes=()) is None
    assert plan_next_step(queue(waiting), SETTINGS, run="main", step=1, flushes=["999-9"]) is None


@given(st.integers(0, 60), st.integers(1, 16))
def test_shards_are_contiguous_and_even(microbatches: int, shards: int) -> None:
    """Rising, sizes differing by one at most, larger ones first, all of them used before any is repeated."""
    cut = shards_of(microbatches, shards)
    assert list(cut) == sorted(cut)
    assert len(cut) == microbatches
    sizes = [cut.count(shard) for shard in range(shards)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == microbatches


@given(st.lists(st.tuples(st.integers(0, 2**45), st.integers(0, 99)), max_size=9))
def test_entry_ids_sort_as_redis_orders_them(ids: list[tuple[int, int]]) -> None:
    """By time, then by sequence, as numbers."""
    texts = [f"{milliseconds}-{sequence}" for milliseconds, sequence in ids]
    assert [entry_order(text) for text in texts] == ids


def _schedule(name: str, **changes: int) -> list[float]:
    settings = ClusterSettings(model="m", learning_rate=1.0, learning_rate_schedule=name, **changes)  # type: ignore[arg-type]
    return [round(learning_rate_at(settings, step), 4) for step in range(1, 8)]


def test_learning_rates_at_a_glance() -> None:
    """Each schedule's first seven steps."""
    assert _schedule("constant") == [1.0] * 7
    assert _schedule("constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert _schedule("linear", schedule_steps=4) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert _schedule("linear", warmup_steps=1, schedule_steps=5) == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert _schedule("cosine", schedule_steps=4) == [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0, 0.0]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 64))
def test_a_token_budget_is_kept(tokens: list[int], budget: int) -> None:
    """Contiguous examples, as many as fit; one that is longer than the budget has a microbatch of its own."""
    cuts = cut_examples(tokens, ClusterSettings(model="m", microbatch_tokens=budget))
    assert sum(cuts) == len(tokens)
    rows = [tokens[end - size : end] for size, end in zip(cuts, accumulate(cuts), strict=True)]
    assert all(sum(row) <= budget or len(row) == 1 for row in rows)
    assert all(sum(row) + after[0] > budget for row, after in pairwise(rows))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 12))
def test_a_number_of_microbatches_is_kept(tokens: list[int], microbatches: int) -> None:
    """As many as asked for, none empty, none larger than an even share and its longest example together."""
    cuts = cut_examples(tokens, ClusterSettings(model="m", microbatches=microbatches))
    assert len(cuts) == min(microbatches, len(tokens))
    assert all(cuts)
    assert sum(cuts) == len(tokens)
    rows = [tokens[end - size : end] for size, end in zip(cuts, accumulate(cuts), strict=True)]
    assert max(map(sum, rows)) <= sum(tokens) / len(cuts) + 2 * max(tokens)


def test_each_example_is_a_microbatch_if_nothing_else_is_asked_for() -> None:
    """The simplest cut is the default."""
    assert cut_examples([5, 9, 2], ClusterSettings(model="m")) == (1, 1, 1)


def test_a_step_ends_before_its_tokens_are_too_many() -> None:
    """It is complete when the next example is one too many, and not before that one is seen."""
    settings = ClusterSettings(model="m", step_examples=8, step_tokens=10)
    short = [QueuedExample(f"1-{index}", f"item-{index}", 2 + index, 1) for index in range(4)]
    planned = plan_next_step(short, settings, run="main", step=1, flushes=[])
    assert planned is not None
    assert planned[0].items == ("item-0", "item-1", "item-2")
    assert plan_next_step(short[:3], settings, run="main", step=1, flushes=[]) is None
    long = [QueuedExample("1-1", "a", 50, 1), QueuedExample("1-2", "b", 1, 1)]
    planned = plan_next_step(long, settings, run="main", step=1, flushes=[])
    assert planned is not None
    assert planned[0].items == ("a",)


@pytest.mark.parametrize(("schedule", "expected"), [("1f1b", [3, 3, 4, 5]), ("a-pp", [3, 3, 3, 4])])
def test_the_weights_of_a_step(schedule: str, expected: list[int]) -> None:
    """The newest, or with a-pp those before; where the lineage began at step 3 there are none older."""
    settings = ClusterSettings(model="m", schedule=schedule)
    assert [weights_of(settings, step, base=3) for step in range(3, 7)] == expected
