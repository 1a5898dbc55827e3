"""Attention of an iteration's rows of one token (decodes), all at once: two ways, one for processors and one for GPUs.

Shapes: T tokens of an iteration, H heads, G key-value heads, K values a head, S slots of the cache (one a token), R
rows of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lemix_stage_worker.kv_blocks import BLOCK_TOKENS
from lemix_stage_worker.model.compiled_attention import attend_in_place
from lemix_stage_worker.model.paged_row import Extent, PagedRow


@dataclass(eq=False)
class ReadTokens:
    """Keys and values are read where they are."""

    tokens: Sequence[tuple[int, PagedRow]]
    """Where each row is among the iteration's tokens, and the row."""
    _reads: dict[int | None, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=dict)
    """By window, what the kernel is told; the same for all layers."""

    def attend(
        self,
        query_HTK: Tensor,
        keys_GSK: Tensor,
        values_GSK: Tensor,
        output_THK: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> None:
        if window not in self._reads:
            self._reads[window] = self._read(window)
        scale = query_HTK.shape[2] ** -0.5 if scale is None else scale
        attend_in_place(query_HTK, keys_GSK, values_GSK, *self._reads[window], scale, output_THK)

    def _read(self, window: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows: list[tuple[int, int, int]] = []
        extents: list[Extent] = []
        for at, row in self.tokens:
            own = row.extents(first=max(0, row.end - window) if window else 0)
            rows.append((at, len(extents), len(extents) + len(own)))
            extents += own
        return np.array(rows), np.array(extents)


@dataclass(eq=False)
class CopiedTokens:
    """Keys and values are copied together, since a GPU takes longer to be told of little work than to do it."""

    tokens: Sequence[tuple[int, PagedRow]]
    device: torch.device
    at_R: Tensor = field(init=False)
    """Where they are among the iteration's tokens."""
    ends_R: Tensor = field(init=False)
    slots_RS: Tensor = field(init=False)
    """Of each one's keys; a shorter one's first again where it has none, so that nobody reads what isn't its own."""

    def __post_init__(self) -> None:
        device, rows = self.device, [row for _, row in self.tokens]
        most = max(len(row.blocks) for row in rows)
        blocks_RN = torch.tensor([_padded(row.blocks, most) for row in rows], device=device)
        slots_RS = (blocks_RN[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=device)).flatten(
            1
        )
        self.at_R = torch.tensor([at for at, _ in self.tokens], device=device)
        self.ends_R = torch.tensor([row.end for row in rows], device=device)
        is_own_RS = torch.arange(slots_RS.shape[1], device=device) < self.ends_R[:, None]
        self.slots_RS = torch.where(is_own_RS, slots_RS, slots_RS[:, :1])

    def attend(
        self,
        query_HTK: Tensor,
        keys_GSK: Tensor,
        values_GSK: Tensor,
        output_THK: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> None:
        heads, groups, size = query_HTK.shape[0], keys_GSK.shape[0], query_HTK.shape[2]
        position_S = torch.arange(self.slots_RS.shape[1], device=self.device)
        allowed_RS = position_S < self.ends_R[:, None]
        if window is not None:
            allowed_RS &= position_S >= self.ends_R[:, None] - window
        output = scaled_dot_product_attention(
            query_HTK[:, self.at_R].transpose(0, 1).reshape(-1, groups, heads // groups, size),
            keys_GSK[:, self.slots_RS].transpose(0, 1),
            values_GSK[:, self.slots_RS].transpose(0, 1),
            attn_mask=allowed_RS[:, None, None],
            scale=scale,
        )
        output_THK[self.at_R] = output.reshape(-1, heads, size)


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    return [*blocks, *[0] * (length - len(blocks))]


TokensAtOnce = ReadTokens | CopiedTokens
"""Rows of one token, whose `attend` writes what they see into their places of the output."""
