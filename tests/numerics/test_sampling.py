"""The choice of a token."""

from __future__ import annotations

import pytest
import torch

from lemix_common.sampling import GREEDY, Sampling
from lemix_stage_worker.model.sampling import choose_token, choose_tokens, gumbel_noise

LOGITS_V = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
WARM = Sampling(temperature=1.0, seed=5)


def draws(sampling: Sampling, count: int = 2000) -> torch.Tensor:
    """How often each token is chosen at positions 0, 1, …"""
    tokens = [choose_token(LOGITS_V, sampling, position=position).token for position in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS_V)) / count


def test_greedy_takes_the_most_likely_token() -> None:
    """The highest logit, the first of equals, with the model's own log-probability."""
    choice = choose_token(LOGITS_V, GREEDY, position=0)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(LOGITS_V.log_softmax(-1)[1].item())
    assert choose_token(torch.zeros(5), GREEDY, position=3).token == 0


def test_the_logprob_is_the_models_not_the_samplers() -> None:
    """Temperature and limits change what is chosen, not what the model thinks of it."""
    choice = choose_token(LOGITS_V, Sampling(temperature=9.0, top_k=2, seed=1), position=0)
    assert choice.logprob == pytest.approx(LOGITS_V.log_softmax(-1)[choice.token].item())


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    """Over many positions, frequencies are the softmax at the temperature."""
    for temperature in (0.7, 1.0, 2.0):
        expected = (LOGITS_V / temperature).softmax(-1)
        found = draws(Sampling(temperature=temperature, seed=3))
        assert (found - expected).abs().max() < 0.03


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    """Not on the global generator, not on what was drawn before, not on the order."""
    first = [choose_token(LOGITS_V, WARM, position=position) for position in range(50)]
    torch.manual_seed(0)
    again = [choose_token(LOGITS_V, WARM, position=position) for position in reversed(range(50))]
    assert first == again[::-1]
    other = Sampling(temperature=1.0, seed=6)
    assert first != [choose_token(LOGITS_V, other, position=position) for position in range(50)]


def test_a_choice_does_not_depend_on_the_batch() -> None:
    """A row of a batch gets the token it would get alone, whatever its neighbours ask for."""
    logits_BV = torch.randn(6, 97, generator=torch.Generator().manual_seed(0))
    samplings = [
        GREEDY,
        WARM,
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=2, top_p=0.8),
        WARM,
        GREEDY,
    ]
    positions = [0, 1, 2, 3, 900, 5]
    together = choose_tokens(logits_BV, samplings, positions=positions)
    rows = zip(logits_BV, samplings, positions, strict=True)
    assert together == [choose_token(row, sampling, position=place) for row, sampling, place in rows]


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


def test_top_k_and_top_p_leave_only_the_most_likely() -> None:
    """The k best, or the fewest best whose probabilities reach p; always at least one."""
    assert draws(Sampling(temperature=5.0, top_k=2), 300).nonzero()[:, 0].tolist() == [1, 2]
    assert draws(Sampling(temperature=1.0, top_p=0.7), 300).nonzero()[:, 0].tolist() == [1, 2]
    assert draws(Sampling(temperature=1.0, top_p=1e-9), 50).nonzero()[:, 0].tolist() == [1]
    assert draws(Sampling(temperature=5.0, top_k=99), 2000).gt(0).all()


def test_a_tiny_temperature_is_nearly_greedy_and_stays_finite() -> None:
    """No overflow where logits are divided by almost nothing."""
    assert draws(Sampling(temperature=1e-45, seed=2), 20).nonzero()[:, 0].tolist() == [1]


def test_half_precision_logits_are_chosen_from_in_float32() -> None:
    """The choice is that of the same values in float32."""
    half_V = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert choose_token(half_V, WARM, position=4) == choose_token(half_V.float(), WARM, position=4)
