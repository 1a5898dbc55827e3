"""The choice of the next token: a function of its logits, the request's settings and its position, of nothing else.

Noise comes from a counter-based generator (Philox): the seed is the key, the position the counter. So a token doesn't
depend on the batch it was computed in, on the tokens drawn before, or on any generator's state, and a request that is
redone elsewhere gets the same ones. V is the vocabulary, B the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lemix_common.sampling import Sampling


class Choice(NamedTuple):
    """A token and the model's own log-probability of it (before temperature and limits)."""

    token: int
    logprob: float


def choose_token(logits_V: Tensor, sampling: Sampling, *, position: int) -> Choice:
    """Choose the token at a position (0 is the sequence's first, prompt included)."""
    return choose_tokens(logits_V[None], [sampling], positions=[position])[0]


def choose_tokens(
    logits_BV: Tensor, samplings: Sequence[Sampling], *, positions: Sequence[int]
) -> list[Choice]:
    """Choose one token a row, each as `choose_token` would."""
    logits_BV = logits_BV.detach().float()
    scores_BV = logits_BV
    if not all(sampling.is_greedy for sampling in samplings):
        rows = zip(logits_BV, samplings, positions, strict=True)
        scores_BV = torch.stack(
            [_scores(logits_V, sampling, position) for logits_V, sampling, position in rows]
        )
    tokens_B = scores_BV.argmax(dim=-1)
    logprobs_B = logits_BV.log_softmax(dim=-1).gather(-1, tokens_B[:, None])[:, 0]
    return [
        Choice(token, logprob) for token, logprob in zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)
    ]


def gumbel_noise(vocab_size: int, *, seed: int, position: int) -> Tensor:
    """Standard Gumbel noise, float32: the highest sum of log-probability and noise is a draw from the distribution."""
    bits_V = np.random.Philox(key=seed, counter=[0, 0, 0, position]).random_raw(vocab_size)
    uniform_V = ((bits_V >> np.uint64(11)) + 0.5) * 2.0**-53
    return torch.from_numpy((-np.log(-np.log(uniform_V))).astype(np.float32))


def _scores(logits_V: Tensor, sampling: Sampling, position: int) -> Tensor:
    if sampling.is_greedy:
        return logits_V
    scores_V = (logits_V - logits_V.max()) / sampling.temperature  # the best is 0 however low the temperature
    if 0 < sampling.top_k < len(scores_V):
        scores_V = _without(scores_V, scores_V < scores_V.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        sorted_V, order_V = scores_V.sort(descending=True, stable=True)
        probabilities_V = sorted_V.softmax(dim=-1)
        is_beyond_V = probabilities_V.cumsum(dim=-1) - probabilities_V >= sampling.top_p
        is_beyond_V[0] = False
        scores_V = _without(scores_V, torch.empty_like(is_beyond_V).scatter_(0, order_V, is_beyond_V))
    return scores_V + gumbel_noise(len(scores_V), seed=sampling.seed, position=position).to(scores_V.device)


def _without(scores_V: Tensor, is_excluded_V: Tensor) -> Tensor:
    return scores_V.masked_fill(is_excluded_V, float("-inf"))
