"""The choice of a token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lemix_common.sampling import GREEDY, Sampling
from lemix_stage_worker.model.sampling import Choice, Chooser, choose_tokens, gumbel_noise, scores

LOGITS_V = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
WARM = Sampling(temperature=1.0, seed=5)
NEAR = 1e-5
"""Of a limit: rounding may decide on which side a token is."""

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.7, 0.2]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8, 5.0]),
    min_tokens=st.integers(0, 4),
    logprobs=st.sampled_from([0, 0, 2]),
    seed=st.integers(0, 2**64 - 1),
)


def choose(logits_V: Tensor, sampling: Sampling, *, position: int) -> Choice:
    """The choice for a request without a history."""
    return choose_tokens(logits_V[None], [Chooser(sampling, position)], [position])[0]


def draws(sampling: Sampling, count: int = 2000) -> Tensor:
    """How often each token is chosen at positions 0, 1, …"""
    tokens = [choose(LOGITS_V, sampling, position=position).token for position in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS_V)) / count


def random_logits(*shape: int, seed: int) -> Tensor:
    """As wide as a trained model's."""
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def requests(draw: st.DrawFn) -> tuple[Chooser, int]:
    """A request and the position of its next token."""
    ids = draw(st.lists(st.integers(0, 39), min_size=1, max_size=12))
    stop_ids = draw(st.lists(st.integers(0, 39), max_size=3, unique=True))
    chooser = Chooser(draw(SAMPLINGS), draw(st.integers(1, len(ids))), tuple(stop_ids))
    chooser.note(0, ids)
    return chooser, len(ids)


def test_greedy_takes_the_most_likely_token() -> None:
    """The highest logit, the first of equals; nothing else is computed."""
    assert choose(LOGITS_V, GREEDY, position=0) == Choice(1)
    assert choose(torch.zeros(5), GREEDY, position=3) == Choice(0)


def test_logprobs_are_the_models_not_the_samplers() -> None:
    """Temperature, penalty and limits change what is chosen, not what the model thinks of it; the best come first."""
    chooser = Chooser(Sampling(temperature=9.0, top_k=2, repetition_penalty=3.0, logprobs=2, seed=1), 1)
    chooser.note(0, [1])
    (choice,) = choose_tokens(LOGITS_V[None], [chooser], [1])
    expected = LOGITS_V.log_softmax(-1).tolist()
    assert choice.logprob == pytest.approx(expected[choice.token])
    assert dict(choice.top) == pytest.approx({1: expected[1], 2: expected[2]})
    assert [token for token, _ in choice.top] == [1, 2]
    everything = choose(LOGITS_V, Sampling(logprobs=20), position=0)
    assert [token for token, _ in everything.top] == [1, 2, 0, 3, 4]


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    """Over many positions, frequencies are the softmax at the temperature."""
    for temperature in (0.7, 1.0, 2.0):
        expected = (LOGITS_V / temperature).softmax(-1)
        found = draws(Sampling(temperature=temperature, seed=3))
        assert (found - expected).abs().max() < 0.03


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    """Not on the global generator, not on what was drawn before, not on the order."""
    first = [choose(LOGITS_V, WARM, position=position) for position in range(50)]
    torch.manual_seed(0)
    again = [choose(LOGITS_V, WARM, position=position) for position in reversed(range(50))]
    assert first == again[::-1]
    other = Sampling(temperature=1.0, seed=6)
    assert first != [choose(LOGITS_V, other, position=position) for position in range(50)]


@settings(max_examples=60)
@given(asked=st.lists(requests(), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_a_choice_does_not_depend_on_the_batch(asked: list[tuple[Chooser, int]], seed: int) -> None:
    """A row of a batch gets the token and log-probabilities it would get alone, whatever its neighbours ask for."""
    logits_BV = random_logits(len(asked), 41, seed=seed)
    before_BV = logits_BV.clone()
    choosers, positions = [chooser for chooser, _ in asked], [position for _, position in asked]
    together = choose_tokens(logits_BV, choosers, positions)
    rows = zip(logits_BV, asked, strict=True)
    assert together == [choose_tokens(row[None].clone(), [its], [at])[0] for row, (its, at) in rows]
    assert choose_tokens(logits_BV.flip(0), choosers[::-1], positions[::-1]) == together[::-1]
    assert logits_BV.equal(before_BV)


@settings(max_examples=150)
@given(asked=requests(), seed=st.integers(0, 99), ids=st.lists(st.integers(0, 39), min_size=12, max_size=12))
def test_what_may_be_chosen_is_what_transformers_leaves(
    asked: tuple[Chooser, int], seed: int, ids: list[int]
) -> None:
    """The same tokens survive, with the same probabilities, as after its processors in the order of its `generate`."""
    chooser, position = asked
    sampling = chooser.sampling
    chooser = Chooser(sampling, chooser.prompt_length, chooser.stop_ids)
    chooser.note(0, ids[:position])
    logits_V = random_logits(40, seed=seed)
    had: Any = torch.tensor([ids[:position]])
    expected = logits_V[None]
    if sampling.repetition_penalty != 1:
        expected = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(had, expected)
    if sampling.min_tokens and chooser.stop_ids:
        ends = MinNewTokensLengthLogitsProcessor(
            chooser.prompt_length, sampling.min_tokens, list(chooser.stop_ids)
        )
        expected = ends(had, expected)
    found = scores(logits_V, chooser, position)
    if not sampling.is_greedy:
        expected = TemperatureLogitsWarper(sampling.temperature)(had, expected)
        if sampling.top_k:
            expected = TopKLogitsWarper(sampling.top_k)(had, expected)
        if sampling.top_p < 1:
            likely = expected[0].double().softmax(-1).sort(descending=True).values
            assume((likely.cumsum(-1) - sampling.top_p).abs().min() > NEAR)
            expected = TopPLogitsWarper(sampling.top_p)(had, expected)
        if sampling.min_p:
            shares = expected[0].double().softmax(-1)
            assume(sampling.min_p == 1 or (shares / shares.max() - sampling.min_p).abs().min() > NEAR)
            expected = MinPLogitsWarper(sampling.min_p)(had, expected)
        found = found - gumbel_noise(40, seed=sampling.seed, position=position)
    assert found.isfinite().equal(expected[0].isfinite())
    assert torch.allclose(found.softmax(-1), expected[0].softmax(-1), atol=1e-5)


def test_top_p_of_flat_logits_is_that_of_transformers() -> None:
    """Also where thousands of tokens are needed; beside a row that needs few, and in one with equals."""
    flat_V, steep_V = random_logits(5000, seed=1) / 20, random_logits(5000, seed=2)
    for top_p in (0.9, 0.9999999, 1e-9):
        chooser = Chooser(Sampling(temperature=1.0, top_p=top_p), 0)
        for logits_V in (flat_V, steep_V):
            expected = TopPLogitsWarper(top_p)(torch.zeros(1, 0), logits_V[None])[0]
            found = scores(logits_V, chooser, 0)
            num_other = int((found.isfinite() != expected.isfinite()).sum())
            most = 1 if top_p < 0.99 else 50  # they sum float32, whose rounding decides
            assert num_other <= most
    equals = scores(torch.tensor([0.0, 1.0, 1.0, 1.0]), Chooser(Sampling(temperature=1.0, top_p=0.4), 0), 0)
    assert equals.isfinite().tolist() == [False, True, True, True]


def test_no_stop_is_chosen_before_there_are_enough_tokens() -> None:
    """Counted from the prompt's end; then the most likely token may be one again."""
    chooser = Chooser(Sampling(min_tokens=2), prompt_length=3, stop_ids=(1, 2))
    tokens = [choose_tokens(LOGITS_V[None], [chooser], [position])[0].token for position in (3, 4, 5)]
    assert tokens == [0, 0, 1]


def test_a_history_may_come_again_and_in_any_cut_but_not_with_gaps() -> None:
    """What counts are the tokens before the position, however often and in what pieces they were told."""
    sampling, ids = Sampling(repetition_penalty=2.0), [1, 4, 2, 1, 3]
    whole, pieces = Chooser(sampling, 3), Chooser(sampling, 3)
    whole.note(0, ids)
    for position, cut in ((0, ids[:2]), (1, ids[1:4]), (0, ids[:3]), (4, ids[4:]), (0, [])):
        pieces.note(position, cut)
    for position in range(6):
        assert set(pieces.history(position)) == set(ids[:position])
        assert scores(LOGITS_V, pieces, position).equal(scores(LOGITS_V, whole, position))
    with pytest.raises(ValueError, match="tokens 5 to 5 were not noted"):
        pieces.note(6, [1])
    with pytest.raises(ValueError, match="tokens 5 to 6 were not noted"):
        choose_tokens(LOGITS_V[None], [pieces], [7])


def test_a_history_is_kept_only_where_the_choice_depends_on_it() -> None:
    """Other requests note nothing, so need not be told."""
    chooser = Chooser(WARM, 3)
    chooser.note(10, [1, 2])
    assert chooser.history(0) == []
    assert choose_tokens(LOGITS_V[None], [chooser], [12])


def test_the_noise_is_pinned() -> None:
    """Known values: a change of numpy or of ours that alters users' texts is noticed."""
    assert gumbel_noise(3, seed=7, position=2).tolist() == [
        2.9728193283081055,
        2.507709503173828,
        2.482050657272339,
    ]
    assert gumbel_noise(3, seed=2**64 - 1, position=2**40).isfinite().all()


def test_noise_of_neighbouring_positions_is_unrelated() -> None:
    """Positions are counters far apart: one position's noise is no shifted copy of the next one's."""
    seen = {value for position in range(20) for value in gumbel_noise(50, seed=1, position=position).tolist()}
    assert len(seen) == 1000


def test_limits_leave_only_the_most_likely() -> None:
    """The k best, the fewest best whose probabilities reach p, those near enough to the best; always at least one."""
    assert draws(Sampling(temperature=5.0, top_k=2), 300).nonzero()[:, 0].tolist() == [1, 2]
    assert draws(Sampling(temperature=1.0, top_p=0.7), 300).nonzero()[:, 0].tolist() == [1, 2]
    assert draws(Sampling(temperature=1.0, top_p=1e-9), 50).nonzero()[:, 0].tolist() == [1]
    assert draws(Sampling(temperature=1.0, min_p=0.3), 300).nonzero()[:, 0].tolist() == [1, 2]
    assert draws(Sampling(temperature=5.0, top_k=99), 2000).gt(0).all()


@pytest.mark.parametrize("temperature", [1e-45, 1e300])
def test_any_temperature_stays_finite(temperature: float) -> None:
    """Nearly greedy where logits are divided by almost nothing, even where by a lot; what is forbidden stays so."""
    chooser = Chooser(Sampling(temperature=temperature, min_tokens=1, seed=2), 0, (1,))
    left = scores(LOGITS_V, chooser, 0)
    assert left.isfinite().tolist() == [True, False, True, True, True]
    assert not left.isnan().any()
    if temperature < 1:
        assert draws(Sampling(temperature=temperature, seed=2), 20).nonzero()[:, 0].tolist() == [1]


def test_the_strongest_penalty_stays_finite() -> None:
    """Logits of any size that a model may have are still ordered."""
    for penalty in (0.01, 100.0):
        chooser = Chooser(Sampling(temperature=1.0, repetition_penalty=penalty), 1)
        chooser.note(0, [1, 4])
        assert scores(LOGITS_V * 1e6, chooser, 2).isnan().sum() == 0


def test_half_precision_logits_are_chosen_from_in_float32() -> None:
    """The choice is that of the same values in float32."""
    half_V = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert choose(half_V, WARM, position=4) == choose(half_V.float(), WARM, position=4)


def test_a_logprob_travels_as_a_short_text() -> None:
    """Six digits of each; nothing where nothing was asked for."""
    assert Choice(3).logprob_text == ""
    text = Choice(3, -math.pi, ((7, -1e-9), (3, -math.pi))).logprob_text
    assert text == "[3,-3.141593,[[7,0.0],[3,-3.141593]]]"
