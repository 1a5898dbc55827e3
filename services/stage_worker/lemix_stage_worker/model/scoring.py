"""How probable a given continuation is: scores for requests, the loss for training.

A target is the token that should follow a position, `NO_TARGET` where nothing is asked. Only positions with a target
go through the head, whose logits are the largest tensor of a training step. R positions of T have a target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lemix_stage_worker.model.stage import StageModel

NO_TARGET = -100
MIN_HEAD_ROWS = 4
"""CPU kernels round products of fewer rows differently; a score must not depend on how many are asked for at once."""


def target_rows(targets_T: Tensor, *, max_rows: int | None = None) -> tuple[Tensor, ...]:
    """The positions with a target, ascending, in even chunks of at most `max_rows` (None: in one); () if none has."""
    rows_R = (targets_T != NO_TARGET).nonzero()[:, 0]
    chunks = math.ceil(len(rows_R) / (max_rows or max(len(rows_R), 1)))
    return tuple(rows_R.tensor_split(chunks)) if chunks else ()


def token_logprobs(stage: StageModel, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """The last stage's log-probability of each target, in order: (R), at least float32. Differentiable."""
    rows_R = (targets_T != NO_TARGET).nonzero()[:, 0]
    num_rows = len(rows_R)
    if num_rows == 0:
        return hidden_TD.sum() * torch.zeros(0, device=hidden_TD.device)
    filled = torch.cat([rows_R, rows_R[-1:].expand(max(MIN_HEAD_ROWS - num_rows, 0))])
    logits_RV = stage.logits(hidden_TD[filled])[:num_rows]
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return -functional.cross_entropy(logits_RV, targets_T[rows_R], reduction="none")


def loss_sum(stage: StageModel, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """The training loss: minus the log-probabilities of all targets, summed; a scalar, at least float32.

    To bound memory and blocking, sum it over `target_rows` chunks: `loss_sum(stage, hidden_TD[rows], targets_T[rows])`.
    """
    return -token_logprobs(stage, hidden_TD, targets_T).sum()
