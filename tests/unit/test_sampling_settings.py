"""What a client may ask of sampling."""

from __future__ import annotations

import pytest

from lemix_common.errors import BadInput
from lemix_common.sampling import GREEDY, Sampling


def test_the_default_is_greedy() -> None:
    """Nothing asked for means the most likely token."""
    assert Sampling() == GREEDY
    assert GREEDY.is_greedy
    assert not Sampling(temperature=0.1).is_greedy


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_must_be_a_finite_number_of_0_or_more(temperature: float) -> None:
    """Anything else is refused before the item is accepted."""
    with pytest.raises(BadInput, match="temperature"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("top_p", [-0.5, 0.0, 1.1, float("nan")])
def test_top_p_must_leave_something_to_choose(top_p: float) -> None:
    """0 would exclude every token, more than 1 means nothing."""
    with pytest.raises(BadInput, match="top_p"):
        Sampling(top_p=top_p)


def test_top_k_and_the_seed_are_whole_numbers_in_range() -> None:
    """Negative limits and seeds that don't fit 64 bits are refused."""
    with pytest.raises(BadInput, match="top_k"):
        Sampling(top_k=-1)
    with pytest.raises(BadInput, match="seed"):
        Sampling(seed=-1)
    with pytest.raises(BadInput, match="seed"):
        Sampling(seed=2**64)
