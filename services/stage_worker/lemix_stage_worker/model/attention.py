"""Attention over packed rows: each example by itself, by the same kernel and to the same bits as alone.

transformers knows a packed row by positions that start again, and keeps its examples apart with a mask of T × T
values. Torch's attention then computes all T² products, where examples of n tokens need Σ n² ÷ 2, and it rounds them
differently from a row of one example. So a row is cut where an example begins, and each part is attended to as a row of
its own would be: causally, without a mask where the model's window allows it. Rows that aren't packed, and all rows
with a cache, take transformers' own way.

Shapes: B rows, H heads, T tokens, K values a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_attention: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
_mask: Callable[..., Tensor | None] = sdpa_mask

BY_SEGMENTS = "lemix_sdpa_by_segments"
"""The name in transformers' registries."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """In place of a mask, what a row is made of: its examples' tokens, and the mask of each that needs one."""

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    """None: plainly causal. Else (1, 1, n, n), for an example longer than the model's window."""


class PagedAttention(Protocol):
    """Attention over keys and values of its own, in place of a mask and a cache (see `paged_attention`)."""

    def attend(
        self,
        layer: int,
        query_HTK: Tensor,
        key_GTK: Tensor,
        value_GTK: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """What a layer's tokens see: (T, H, K)."""


def attend_by_segments(model: PreTrainedModel) -> None:
    """Let a model that uses torch's attention (SDPA) do so by segments; another one keeps its own."""
    AttentionInterface.register(BY_SEGMENTS, attention_by_segments)
    AttentionMaskInterface.register(BY_SEGMENTS, mask_by_segments)
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001 - no public name says what was chosen
        model.set_attn_implementation(BY_SEGMENTS)


def mask_by_segments(**arguments: Any) -> Tensor | Segments | None:
    """What transformers calls for a mask, once a forward; the arguments are those of its `sdpa_mask`.

    That a causal mask may not be left out says that a row is packed; a token that may not look at the one before it
    says where an example begins.
    """
    num_tokens = arguments["q_length"]
    is_one_row = arguments["batch_size"] == 1 and arguments["attention_mask"] is None
    if arguments["allow_is_causal_skip"] or not is_one_row or arguments["kv_length"] != num_tokens:
        return _mask(**arguments)
    starts = _starts(arguments["mask_function"], num_tokens, arguments["device"])
    lengths = tuple(end - start for start, end in pairwise([*starts, num_tokens]))
    masks = [
        _mask(
            **arguments
            | {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
            | {"allow_is_causal_skip": True}
        )
        for start, length in zip(starts, lengths, strict=True)
    ]
    return Segments(lengths, tuple(masks))


def attention_by_segments(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    attention_mask: Tensor | Segments | None,
    paged: PagedAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call for attention: (B, T, H, K), and no weights."""
    if paged is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale, window = options.get("scaling"), options.get("sliding_window")
        return paged.attend(layer, query_BHTK[0], key_BHTK[0], value_BHTK[0], scale=scale, window=window)[
            None
        ], None
    if not isinstance(attention_mask, Segments):
        return _attention(module, query_BHTK, key_BHTK, value_BHTK, attention_mask, **options)
    lengths = list(attention_mask.lengths)
    segments = zip(
        *(torch.split_with_sizes(states, lengths, dim=2) for states in (query_BHTK, key_BHTK, value_BHTK)),
        attention_mask.masks,
        strict=True,
    )
    return torch.cat([_attention(module, *segment, **options)[0] for segment in segments], dim=1), None


def _starts(mask_function: Callable[..., Tensor], num_tokens: int, device: torch.device | str) -> list[int]:
    token_T = torch.arange(1, num_tokens, device=device)
    zero_T = torch.zeros_like(token_T)
    follows_T = mask_function(zero_T, zero_T, token_T, token_T - 1)
    return [0, *(token_T[~follows_T]).tolist()]
