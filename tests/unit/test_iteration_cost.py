"""Chunks are sized by what iterations took: as many tokens as fit into a time."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_stage_worker.iteration_cost import UNKNOWN_TOKENS, IterationCost

MIXED = (1, 4, 40, 16, 200, 8)
"""Tokens of iterations with and without chunks."""


def note(
    cost: IterationCost, counts: Iterable[int], *, fixed_s: float, token_s: float, noise: float = 0.0
) -> IterationCost:
    """After iterations of so many tokens, each of which took its time, more or less."""
    draw = random.Random(1)
    for count in counts:
        cost.note(count, (fixed_s + token_s * count) * (1 + noise * draw.uniform(-1, 1)))
    return cost


@given(
    fixed_s=st.floats(0, 0.02),
    token_s=st.floats(1e-5, 1e-3),
    counts=st.lists(st.sampled_from(MIXED), max_size=100),
)
def test_iterations_that_differ_tell_both_parts(fixed_s: float, token_s: float, counts: list[int]) -> None:
    """Seconds of any iteration and of each token, whatever came before the last ones of all sizes."""
    cost = note(IterationCost(), [*counts, *MIXED], fixed_s=fixed_s, token_s=token_s)
    assert cost.coefficients == pytest.approx((fixed_s, token_s), rel=1e-3, abs=1e-6)
    assert cost.more_tokens_within(100.5 * token_s) == pytest.approx(100, abs=1)


def test_iterations_that_are_all_alike_tell_the_whole() -> None:
    """All of their time is their tokens': a chunk is rather too small than too large."""
    cost = note(IterationCost(), [8] * 50, fixed_s=0.004, token_s=0.0001)
    assert cost.coefficients == pytest.approx((0.0, 0.0048 / 8))
    assert cost.more_tokens_within(0.02) == int(0.02 / (0.0048 / 8))


def test_what_was_long_ago_counts_little() -> None:
    """A machine that becomes half as fast halves the chunks within a hundred iterations."""
    cost = note(IterationCost(), MIXED * 20, fixed_s=0.0, token_s=0.0001)
    before = cost.more_tokens_within(0.02)
    note(cost, MIXED * 17, fixed_s=0.0, token_s=0.0002)
    assert before == pytest.approx(200, abs=1)
    assert cost.more_tokens_within(0.02) == pytest.approx(100, rel=0.1)


def test_noise_is_averaged() -> None:
    """With times that are off by up to 30 % the chunk is within 15 % of the right one."""
    cost = note(IterationCost(), MIXED * 20, fixed_s=0.002, token_s=0.0001, noise=0.3)
    assert cost.more_tokens_within(0.02) == pytest.approx(200, rel=0.15)


def test_before_anything_is_known_a_chunk_is_small() -> None:
    """Nobody who decodes then waits for long."""
    assert IterationCost().more_tokens_within(0.02) == UNKNOWN_TOKENS


def test_more_tokens_in_less_time_are_no_news() -> None:
    """Where other work made the short iterations long, tokens still cost something."""
    cost = IterationCost()
    for count, seconds in ((1, 0.05), (200, 0.01), (1, 0.05), (200, 0.01)):
        cost.note(count, seconds)
    fixed_s, token_s = cost.coefficients
    assert (fixed_s, token_s > 0) == (0.0, True)
