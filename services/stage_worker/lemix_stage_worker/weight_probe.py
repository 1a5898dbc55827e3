"""What weights make of a fixed input: what tells wrong ones from right ones where every hash is in order.

Each layer is probed by itself, so whoever hosts it, in whatever cut, can do so. Its answer is some values of its output
for an input that is the same everywhere (no random numbers, whose making may change). The last layer's goes on through
norm and head, to the loss on fixed targets. A layer whose weights were transposed, permuted or taken from elsewhere
answers differently by far more than rounding, which is what `check_answers` allows for.

Shapes: B = 1, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lemix_common.errors import WeightsDamaged
from lemix_stage_worker.model.scoring import token_logprobs
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.trained_weights import HALF

TOKENS = 16
VALUES = 32
"""Of each layer's output that are kept."""
TOLERANCE = {False: 1e-3, True: 5e-2}
"""Relative to the values' size; by whether the weights are in half precision."""


@torch.no_grad()
def probe(model: StageModel) -> dict[int, list[float]]:
    """What each layer of a stage answers, by its number in the whole model."""
    return {part.cut.layers.start: _answer(part) for part in model.parts()}


def check_answers(model: StageModel, sealed: Mapping[int, Sequence[float]], directory: Path) -> None:
    """Compare with what the layers answered when they were sealed; `WeightsDamaged` names the first that doesn't agree.

    Layers that were sealed without an answer aren't asked.
    """
    if not sealed:
        return
    is_half = any(parameter.dtype in HALF for parameter in model.leaves().values())
    for layer, answer in probe(model).items():
        if layer not in sealed:
            continue
        now, then = torch.tensor(answer), torch.tensor(list(sealed[layer]))
        apart = float((now - then).abs().max() / then.square().mean().sqrt())
        if not apart <= TOLERANCE[is_half]:
            raise WeightsDamaged(
                f"layer {layer} in {directory} computes something else than the layer that was trained "
                f"(its answer to a fixed input is off by {apart:.2g} of its size), though its files are as sealed"
            )


def _answer(part: StageModel) -> list[float]:
    positions_T = torch.arange(TOKENS, device=next(iter(part.leaves().values())).device)
    if part.is_first:
        ids_BT = (positions_T * 7919)[None] % part.base.config.vocab_size
        output_BTD = part(ids_BT, positions_T)
    else:
        hidden_BTD = _wave(part)
        output_BTD = part(hidden_BTD, positions_T)
        if not part.is_last:
            output_BTD = (
                output_BTD - hidden_BTD
            )  # what the layer adds, which may be little beside what it is given
    values = output_BTD.float().flatten()
    answer: list[float] = values[:: max(1, len(values) // VALUES)][:VALUES].tolist()
    if part.is_last:
        targets_T = (positions_T * 104_729) % part.base.config.vocab_size
        answer.append(-float(token_logprobs(part, output_BTD[0], targets_T).mean()))
    return [float(f"{value:.7g}") for value in answer]


def _wave(part: StageModel) -> Tensor:
    """Hidden states of size 1 that no two positions share."""
    parameter = next(iter(part.leaves().values()))
    size = part.base.config.hidden_size
    steps = torch.arange(1, TOKENS * size + 1, dtype=torch.float64)
    return (steps.sin() * 2**0.5).reshape(1, TOKENS, size).to(parameter.device, parameter.dtype)
