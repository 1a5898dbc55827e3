from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix.limits import reject_over_long, split_example, truncate_prompt
from lemix_common.errors import OverLong

LENGTHS = st.integers(1, 60)
CONTEXTS = st.integers(2, 40)


def ids(count: int, first: int = 0) -> tuple[int, ...]:
    """That many different tokens."""
    return tuple(range(first, first + count))


def test_an_over_long_item_names_both_lengths() -> None:
    """What it has and what fits."""
    with pytest.raises(OverLong, match=r"5 prompt \+ 6 new tokens = 11, but the model's context is 10"):
        reject_over_long(ids(5), 6, "new", 10)


def test_an_item_of_the_contexts_length_fits() -> None:
    """The limit itself is allowed."""
    reject_over_long(ids(5), 5, "new", 10)


@settings(max_examples=50)
@given(prompt=LENGTHS, following=LENGTHS, context=CONTEXTS)
def test_truncating_keeps_the_prompts_end(prompt: int, following: int, context: int) -> None:
    """What is left fits, ends like the prompt and is as long as can be; without room for a token it is refused."""
    if following >= context:
        with pytest.raises(OverLong, match="leave no room for a prompt"):
            truncate_prompt(ids(prompt), following, "reference", context)
        return
    kept = truncate_prompt(ids(prompt), following, "reference", context)
    assert kept == ids(prompt)[-len(kept) :]
    assert len(kept) == min(prompt, context - following)


def test_a_reference_that_fills_the_context_can_be_split() -> None:
    """The error says so; new tokens can't be."""
    with pytest.raises(OverLong, match=r"12 reference tokens leave .* for training --over-long split"):
        truncate_prompt(ids(5), 12, "reference", 10)
    with pytest.raises(OverLong, match="ask for fewer"):
        truncate_prompt(ids(5), 12, "new", 10)


@settings(max_examples=50)
@given(prompt=LENGTHS, reference=LENGTHS, context=CONTEXTS)
def test_splitting_puts_each_reference_token_in_one_part(prompt: int, reference: int, context: int) -> None:
    """All parts fit, their references are the whole in order, and each has the prompt's end before it."""
    parts = split_example(ids(prompt), ids(reference, 100), context)
    assert sum((part[1] for part in parts), ()) == ids(reference, 100)
    for part_prompt, part_reference in parts:
        assert 1 <= len(part_reference) <= context - len(part_prompt)
        assert part_prompt == ids(prompt)[-len(part_prompt) :] != ()


def test_an_example_that_fits_is_not_split() -> None:
    """One part, unchanged."""
    assert split_example((1,), (2, 3), 3) == [((1,), (2, 3))]


def test_a_context_of_one_token_holds_no_example() -> None:
    """There is no way to cut it."""
    with pytest.raises(OverLong):
        split_example((1,), (2,), 1)
