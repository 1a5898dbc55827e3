"""Weights in the order in which a processor's product of few rows wants them: what served versions compute with.

A decode step multiplies each matrix by a handful of rows. Torch's own product reads the matrix as it is stored; oneDNN
has one for matrices that were rearranged beforehand, which takes 35 % less with 4 to 16 rows, 26 % with 32, 17 % with
64 and 4 % with 256 (one thread of an AMD EPYC, float32, a Llama's 512 × 512 and 512 × 1,376; there its results don't
depend on the number of rows, to the bit, and on other processors but for rounding).

The rearranged matrix takes the place of the stored one, so a version that only serves takes as much memory as before.
Where the kernel isn't there (other processors, other types), stages are left as they are.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from lemix_common.costs import RowSteps, computed_rows
from lemix_stage_worker.model.stage import StageModel

_pack: Final[Any] = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_multiply: Final[Any] = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_ROWS: Final = 16
"""What the order is chosen for; it is the same from 8 rows on."""
ROW_STEPS: Final[RowSteps] = ((4, 4), (8, 1), (32, 4), (128, 16), (256, 64))
"""How numbers of rows are rounded up; profiles say so, too."""


class PackedLinear(nn.Module):
    """A linear layer whose matrix is rearranged."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.packed = _pack(weight_NK.detach().contiguous(), _ROWS)
        self.bias_N = bias_N

    def forward(self, input_BTK: Tensor) -> Tensor:
        """(…, rows, in) to (…, rows, out)."""
        num_rows = input_BTK.shape[-2]
        if missing := padded_rows(num_rows) - num_rows:
            return self._multiply(pad(input_BTK, (0, 0, 0, missing)))[..., :num_rows, :]
        return self._multiply(input_BTK)

    def _multiply(self, input_BTK: Tensor) -> Tensor:
        output: Tensor = _multiply(input_BTK, self.packed, self.bias_N, "none", [], "")
        return output


def padded_rows(num_rows: int) -> int:
    """So many rows are computed for this many.

    oneDNN keeps half a megabyte for every shape that it has met, and takes half a millisecond for a new one. Four rows
    take less than one to three (by a quarter), for which it has another kernel.
    """
    return int(computed_rows(num_rows, ROW_STEPS))


def can_pack(parameter: Tensor) -> bool:
    """Whether the kernel is there for such weights."""
    return (
        parameter.device.type == "cpu"
        and parameter.dtype == torch.float32
        and _pack is not None
        and _multiply is not None
    )


def pack_stage(stage: StageModel) -> StageModel:
    """The stage with rearranged matrices, for serving: it can't learn, and matrices are none of its leaves."""
    parameters = list(stage.leaves().values())
    if not all(map(can_pack, parameters)):
        return stage
    memo: dict[int, object] = {id(parameter): parameter for parameter in parameters}
    base, head = copy.deepcopy(stage.base, memo), copy.deepcopy(stage.head, memo)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if (packed := _packed(child)) is not None:
                setattr(module, name, packed)
    return replace(stage, base=base, head=head and cast("nn.Linear", _packed(head)), is_packed=True)


def _packed(module: nn.Module) -> PackedLinear | None:
    match module:
        case nn.Linear():
            return PackedLinear(module.weight, _detached(module.bias))
        case Conv1D():  # GPT-2's: its matrix lies the other way
            return PackedLinear(module.weight.t(), _detached(module.bias))
        case _:
            return None


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
