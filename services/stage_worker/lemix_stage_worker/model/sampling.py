"""The choice of the next token: a function of its logits, the request's settings, its tokens and its position only.

Noise comes from a counter-based generator (Philox): the seed is the key, the position the counter. So a token doesn't
depend on the batch it was computed in, on the tokens drawn before, or on any generator's state, and a request that is
redone elsewhere gets the same ones. V is the vocabulary, B the batch, R some of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lemix_common.logprobs import TokenLogprob
from lemix_common.sampling import Sampling

_COLDEST, _HOTTEST = 1e-6, 1e6
"""Temperatures beyond these are these: what is divided by them stays a number, and the choice is the same."""

_OFTEN_ENOUGH = 256
"""Top-p looks among so many best tokens first; only if these don't have the probability, among all."""


class Choice(NamedTuple):
    """A token and, if asked for, the model's own log-probability of it and of the most likely ones (best first)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

    @property
    def logprob_text(self) -> str:
        """As it travels; '' if not asked for."""
        return "" if self.logprob is None else TokenLogprob(self.token, self.logprob, self.top).to_text()


@dataclass(eq=False)
class Chooser:
    """A request at the last stage: how its tokens are chosen, and which it has had."""

    sampling: Sampling
    prompt_length: int
    stop_ids: tuple[int, ...] = ()
    """What ``min_tokens`` forbids."""
    _first_at: dict[int, int] = field(default_factory=dict)
    """Each token it has had to where it first was, in that order; empty unless the choice depends on it."""
    _num_known: int = 0

    def note(self, position: int, ids: Sequence[int]) -> None:
        """Tokens of the sequence from a position on, prompt included; known ones may come again, in any cut."""
        if not self.sampling.needs_history:
            return
        if position > self._num_known:
            raise ValueError(f"tokens {self._num_known} to {position - 1} were not noted")
        for at, token in enumerate(ids[self._num_known - position :], start=self._num_known):
            self._first_at.setdefault(token, at)
        self._num_known = max(self._num_known, position + len(ids))

    def history(self, position: int) -> list[int]:
        """The distinct tokens before a position."""
        if position > self._num_known:
            raise ValueError(f"tokens {self._num_known} to {position - 1} were not noted")
        return [token for token, _ in takewhile(lambda first: first[1] < position, self._first_at.items())]

    def forbidden(self, position: int) -> tuple[int, ...]:
        """What may not be chosen at a position, whatever its logit."""
        return self.stop_ids if position - self.prompt_length < self.sampling.min_tokens else ()

    def is_plain(self, position: int) -> bool:
        """The most likely token is taken as it is."""
        return self.sampling.is_greedy and not self.sampling.needs_history and not self.forbidden(position)


def choose_tokens(logits_BV: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> list[Choice]:
    """Choose the token at each row's position (0 is the sequence's first, prompt included).

    A row's choice doesn't depend on the others. A batch without options costs one arg max.
    """
    logits_BV = logits_BV.detach().float()
    tokens = _all_scores(logits_BV, choosers, positions).argmax(dim=-1).tolist()
    return [
        _with_logprobs(token, logits_V, chooser.sampling.logprobs)
        for token, logits_V, chooser in zip(tokens, logits_BV, choosers, strict=True)
    ]


def scores(logits_V: Tensor, chooser: Chooser, position: int) -> Tensor:
    """What the token at a position is the arg max of."""
    return _all_scores(logits_V.detach().float()[None], [chooser], [position])[0]


def gumbel_noise(vocab_size: int, *, seed: int, position: int) -> Tensor:
    """Standard Gumbel noise, float32: the highest sum of log-probability and noise is a draw from the distribution."""
    return torch.from_numpy(_noise(_noise_bits(vocab_size, seed, position)))


def _all_scores(logits_BV: Tensor, choosers: Sequence[Chooser], positions: Sequence[int]) -> Tensor:
    asked = list(zip(choosers, positions, strict=True))
    rows = [row for row, (chooser, position) in enumerate(asked) if not chooser.is_plain(position)]
    if not rows:
        return logits_BV
    rows_R = torch.tensor(rows, device=logits_BV.device)
    scores_RV = logits_BV[rows_R]
    for scores_V, row in zip(scores_RV, rows, strict=True):
        _penalize(scores_V, *asked[row])
    sampled = [index for index, row in enumerate(rows) if not choosers[row].sampling.is_greedy]
    if sampled:
        sampled_R = torch.tensor(sampled, device=logits_BV.device)
        drawn = [asked[rows[index]] for index in sampled]
        scores_RV[sampled_R] = _noisy(scores_RV[sampled_R], drawn)
    return logits_BV.index_copy(0, rows_R, scores_RV)


def _penalize(scores_V: Tensor, chooser: Chooser, position: int) -> None:
    """In place: what the request has had is less likely, what it may not have yet is impossible."""
    if chooser.sampling.needs_history:
        ids = torch.tensor(chooser.history(position), dtype=torch.int64, device=scores_V.device)
        had, penalty = scores_V[ids], chooser.sampling.repetition_penalty
        scores_V[ids] = torch.where(had < 0, had * penalty, had / penalty)
    if forbidden := chooser.forbidden(position):
        scores_V[list(forbidden)] = -math.inf


def _noisy(scores_RV: Tensor, asked: Sequence[tuple[Chooser, int]]) -> Tensor:
    """Temperature, limits and noise."""
    samplings = [chooser.sampling for chooser, _ in asked]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=scores_RV.dtype, device=scores_RV.device)[:, None]

    # from here on the best is 0, however low the temperature
    scores_RV = scores_RV - scores_RV.amax(dim=-1, keepdim=True)
    scores_RV = scores_RV / column(
        [min(max(sampling.temperature, _COLDEST), _HOTTEST) for sampling in samplings]
    )
    scores_RV = _keep_top_k(scores_RV, [sampling.top_k for sampling in samplings])
    if limited := [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]:
        top_ps = [samplings[row].top_p for row in limited]
        scores_RV[limited] = _keep_top_p(scores_RV[limited], top_ps)
    if any(sampling.min_p for sampling in samplings):
        least = [math.log(sampling.min_p) if sampling.min_p else -math.inf for sampling in samplings]
        scores_RV = _without(scores_RV, scores_RV < column(least))
    draws = [(chooser.sampling.seed, position) for chooser, position in asked]
    return scores_RV + _noise_where(scores_RV.isfinite(), draws)


def _keep_top_k(scores_RV: Tensor, top_ks: Sequence[int]) -> Tensor:
    vocab_size = scores_RV.shape[-1]
    most = max(top_k for top_k in (0, *top_ks) if top_k < vocab_size)
    if not most:
        return scores_RV
    best_RK = scores_RV.topk(most).values
    is_limited_R = torch.tensor([0 < top_k < vocab_size for top_k in top_ks], device=scores_RV.device)
    last_R = torch.tensor([min(top_k, most) - 1 for top_k in top_ks], device=scores_RV.device).clamp(min=0)
    least_R = best_RK.gather(-1, last_R[:, None])
    return _without(scores_RV, (scores_RV < least_R) & is_limited_R[:, None])


def _keep_top_p(scores_RV: Tensor, top_ps: Sequence[float]) -> Tensor:
    """Each row's best is 0. Like top-k, it keeps all that are as likely as the last one it keeps."""
    top_p_R = torch.tensor(top_ps, dtype=torch.float64, device=scores_RV.device)
    least_R, is_found_R = _last_within(scores_RV, top_p_R, among=_OFTEN_ENOUGH)
    if not is_found_R.all():
        is_flat_R = ~is_found_R
        vocab_size = scores_RV.shape[-1]
        least_R[is_flat_R], _ = _last_within(scores_RV[is_flat_R], top_p_R[is_flat_R], among=vocab_size)
    return _without(scores_RV, scores_RV < least_R[:, None])


def _last_within(scores_RV: Tensor, top_p_R: Tensor, *, among: int) -> tuple[Tensor, Tensor]:
    """The score of the last token that top-p keeps, looked for among so many best, and whether it is one of them.

    Sums are of doubles, so that they decide alike however many rows there are.
    """
    best_RK = scores_RV.topk(min(among, scores_RV.shape[-1])).values
    total_R = scores_RV.exp().sum(dim=-1, dtype=torch.float64)
    share_RK = best_RK.double().exp() / total_R[:, None]
    up_to_RK = (
        share_RK.cpu().cumsum(dim=-1).to(share_RK.device)
    )  # on GPUs the order of such a sum isn't fixed
    last_R = (up_to_RK < top_p_R[:, None]).sum(dim=-1).clamp(max=best_RK.shape[-1] - 1)
    return best_RK.gather(-1, last_R[:, None])[:, 0], up_to_RK[:, -1] >= top_p_R


def _without(scores: Tensor, is_excluded: Tensor) -> Tensor:
    return scores.masked_fill(is_excluded, -math.inf)


def _noise_where(is_left_RV: Tensor, draws: Sequence[tuple[int, int]]) -> Tensor:
    """Each row's noise, of the tokens that are left only: its logarithms are what costs."""
    noise_RV = np.zeros(is_left_RV.shape, dtype=np.float32)
    for noise_V, is_left_V, (seed, position) in zip(noise_RV, is_left_RV.cpu().numpy(), draws, strict=True):
        noise_V[is_left_V] = _noise(_noise_bits(len(noise_V), seed, position)[is_left_V])
    return torch.from_numpy(noise_RV).to(is_left_RV.device)


def _noise_bits(vocab_size: int, seed: int, position: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.random.Philox(key=seed, counter=[0, 0, 0, position]).random_raw(vocab_size)


def _noise(bits: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    noise: np.ndarray[tuple[int], np.dtype[np.float32]] = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def _with_logprobs(token: int, logits_V: Tensor, num_top: int) -> Choice:
    if not num_top:
        return Choice(token)
    logprobs_V = logits_V.clone().log_softmax(dim=-1)  # a row of its own: sums may depend on where one lies
    values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs_V[token]), top)
