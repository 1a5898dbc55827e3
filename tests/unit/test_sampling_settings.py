"""What a client may ask of sampling."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.errors import BadInput
from lemix_common.sampling import GREEDY, NO_STOPS, Sampling, Stopping, sampling_of, stopping_of


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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, 0.001, 1e6, float("nan"), float("inf")]),
        ("min_tokens", [-1, 1.5]),
        ("logprobs", [-1, 21, 2.0]),
        ("top_k", [2.5]),
        ("seed", [0.5]),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name: str, values: list[Any]) -> None:
    """Numbers out of range, not a number, or not whole where they count something."""
    for value in values:
        with pytest.raises(BadInput, match=f"^{name} .* can't be used: give "):
            Sampling(**{name: value})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop_strings": ("",)}, "of 0 characters"),
        ({"stop_strings": ("x" * 257,)}, "of 257 characters"),
        ({"stop_strings": ("x",) * 17}, "17 stop strings"),
        ({"stop_strings": ("\ud800",)}, "not valid UTF-8 at character 0"),
        ({"stop_strings": "END"}, "give a tuple"),
        ({"stop_strings": (7,)}, "give texts"),
        ({"stop_ids": (-1,)}, "stop id -1"),
        ({"stop_ids": (True,)}, "stop id True"),
        ({"stop_ids": (1,) * 65}, "65 stop ids"),
    ],
)
def test_stops_that_cannot_be_used_are_refused(fields: Any, reason: str) -> None:
    """Too many, too long, empty, or nothing that a text or vocabulary could have."""
    with pytest.raises(BadInput, match=reason):
        Stopping(**fields)


@given(
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 1e308),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.integers(0, 20),
    )
)
def test_sampling_is_the_same_behind_the_broker(sampling: Sampling) -> None:
    """As an item's readable fields and back, to the last digit."""
    assert sampling_of({name: str(value) for name, value in asdict(sampling).items()}) == sampling


def test_stops_are_the_same_behind_the_broker() -> None:
    """Any text, as readable fields and back; fields that aren't there are defaults."""
    stopping = Stopping(stop_ids=(3, 1), stop_strings=("\n", "é😀 END"), include_stop=True)
    fields = {"stop_ids": json.dumps(stopping.stop_ids), "stop_strings": json.dumps(stopping.stop_strings)}
    assert stopping_of(fields | {"include_stop": "1"}) == stopping
    assert (sampling_of({}), stopping_of({})) == (GREEDY, NO_STOPS)
