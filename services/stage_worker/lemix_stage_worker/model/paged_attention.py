"""Attention of many requests at once, each to its own past: keys and values in blocks, without padding.

An iteration's tokens, of however many requests, are one row for everything but attention. There each request's tokens
are looked at by themselves: they attend to the keys and values of its blocks, where theirs have just been written. A
run of blocks that lie next to each other is read where it is; only what is scattered is copied together first.

Rows of one token (decodes) are attended to at once, since they are many and each is little work (`token_attention`).

This is the seam for other kernels: they'd take the same `PagedRow`s and the same cache.

Shapes: T tokens of an iteration, H heads, G key-value heads, K values a head, S slots (one a token) of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from lemix_common.errors import ModelError
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for
from lemix_stage_worker.model.attention import BY_SEGMENTS
from lemix_stage_worker.model.compiled_attention import can_attend
from lemix_stage_worker.model.paged_row import Extent, PagedRow
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.model.token_attention import CopiedTokens, ReadTokens, TokensAtOnce

AttendsTokens = Literal["one by one", "in place", "copied"]
"""How rows of one token are attended to: each by a call of its own; at once, where keys and values are or copied."""


class StaleBlock(Exception):
    """A block holds keys and values of other weights than those that want to read it."""


@dataclass(eq=False)
class KeyValueCache:
    """The keys and values of one stage's layers. Memory is taken as blocks are first written to."""

    keys_GSK: list[Tensor]
    """One a layer."""
    values_GSK: list[Tensor]
    versions: list[str] = field(init=False)
    """By block: the weights that computed what it holds."""
    attends_tokens: AttendsTokens = field(init=False)

    def __post_init__(self) -> None:
        keys_GSK = self.keys_GSK[0]
        if can_attend(keys_GSK):
            self.attends_tokens = "in place"
        else:
            self.attends_tokens = "one by one" if keys_GSK.device.type == "cpu" else "copied"
        self.versions = [""] * (keys_GSK.shape[1] // BLOCK_TOKENS)

    @classmethod
    def of(cls, stage: StageModel, num_blocks: int) -> KeyValueCache:
        """An empty cache for a loaded stage. `ModelError` if its attention can't read one."""
        config = stage.base.config
        if config._attn_implementation != BY_SEGMENTS:  # noqa: SLF001 - no public name says what was chosen
            raise ModelError(
                f"models of type {config.model_type!r} can't be served: they don't use torch's attention"
            )
        parameter = next(stage.base.parameters())
        heads, size = key_value_shape(config)
        num_layers = len(stage.cut.layers)

        def tensors() -> list[Tensor]:
            shape = (heads, num_blocks * BLOCK_TOKENS, size)
            return [
                torch.empty(shape, dtype=parameter.dtype, device=parameter.device) for _ in range(num_layers)
            ]

        return cls(tensors(), tensors())

    def plan(self, rows: Sequence[PagedRow], version: str) -> PagedRows:
        """Where an iteration of these weights reads and writes. `StaleBlock`: what is there is of other weights."""
        slots: list[int] = []
        for row in rows:
            first = row.start // BLOCK_TOKENS
            known = row.blocks[: first + (row.start % BLOCK_TOKENS > 0)]
            if any(self.versions[block] != version for block in known):
                raise StaleBlock(f"a block of the weights of {version} was written by others")
            for block in row.blocks[first:]:
                self.versions[block] = version
            slots += (
                row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                for position in range(row.start, row.end)
            )
        return PagedRows(self, tuple(rows), torch.tensor(slots, device=self.keys_GSK[0].device))


@dataclass(eq=False)
class PagedRows:
    """What attention is told of an iteration, in place of a mask and a cache."""

    cache: KeyValueCache
    rows: tuple[PagedRow, ...]
    slots_T: Tensor
    _by_itself: list[tuple[int, PagedRow, list[Extent]]] = field(init=False)
    """Rows that are attended to by a call of their own: where they begin, and what holds their keys and values."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """By a row's begin and window; the same for all layers."""
    _at_once: TokensAtOnce | None = field(init=False)
    """The rows that are attended to at once."""

    def __post_init__(self) -> None:
        begins = accumulate((row.length for row in self.rows), initial=0)
        placed = list(zip(begins, self.rows, strict=False))
        tokens = [(at, row) for at, row in placed if row.length == 1]
        match self.cache.attends_tokens:
            case "in place" if tokens:
                self._at_once = ReadTokens(tokens)
            case "copied" if len(tokens) > 1:  # one alone needs no copies
                self._at_once = CopiedTokens(tokens, self.slots_T.device)
            case _:
                self._at_once = None
        self._by_itself = [
            (at, row, row.extents()) for at, row in placed if row.length > 1 or self._at_once is None
        ]

    @property
    def positions_T(self) -> Tensor:
        """Of all tokens, in their sequences."""
        ranges = [torch.arange(row.start, row.end) for row in self.rows]
        return torch.cat(ranges).to(self.slots_T.device)

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
        """Write the new keys and values, then let each row's queries attend to its own: (T, H, K)."""
        keys_GSK, values_GSK = self.cache.keys_GSK[layer], self.cache.values_GSK[layer]
        keys_GSK.index_copy_(1, self.slots_T, key_GTK)
        values_GSK.index_copy_(1, self.slots_T, value_GTK)
        heads, groups, size = query_HTK.shape[0], keys_GSK.shape[0], query_HTK.shape[2]
        output_THK = query_HTK.new_empty(query_HTK.shape[1], heads, size)
        if self._at_once is not None:
            self._at_once.attend(query_HTK, keys_GSK, values_GSK, output_THK, scale=scale, window=window)
        for at, row, extents in self._by_itself:
            query, end = query_HTK[None, :, at : at + row.length], at + row.length
            is_token = row.length == 1
            if is_token and heads > groups:  # the heads of a group are as many queries to its keys
                query = query.reshape(1, groups, heads // groups, size)
            is_plain = window is None or row.end <= window
            output = scaled_dot_product_attention(
                query,
                _read(keys_GSK, extents),
                _read(values_GSK, extents),
                attn_mask=None if is_plain and (is_token or row.start == 0) else self._mask(at, row, window),
                is_causal=is_plain and row.start == 0 and not is_token,
                scale=scale,
                enable_gqa=heads > groups and not is_token,
            )
            output_THK[at:end] = output.reshape(heads, row.length, size).transpose(0, 1)
        return output_THK

    def _mask(self, at: int, row: PagedRow, window: int | None) -> Tensor:
        """Which keys a row's tokens may look at: (tokens, keys)."""
        if (at, window) not in self._masks:
            device = self.slots_T.device
            behind = torch.arange(row.start, row.end, device=device)[:, None] - torch.arange(
                row.end, device=device
            )
            allowed = behind >= 0
            self._masks[at, window] = allowed if window is None else allowed & (behind < window)
        return self._masks[at, window]


def num_kv_blocks(source: ModelSource, layers: Sequence[range], *, max_running: int, kv_bytes: int) -> int:
    """The blocks of every stage of a node: for so many whole contexts, or as many as the largest stage may hold.

    `ModelError` if one context is too much.
    """
    heads, size = key_value_shape(source.config)
    num_layers = max(map(len, layers))
    block_bytes = 2 * num_layers * heads * size * source.dtype.itemsize * BLOCK_TOKENS
    of_context = num_blocks_for(source.context_length)
    if of_context * block_bytes > kv_bytes:
        raise ModelError(
            f"kv_bytes = {kv_bytes}: the keys and values of one context of {source.context_length} tokens take "
            f"{of_context * block_bytes} bytes on a stage of {num_layers} layers; allow for more, or use more stages"
        )
    return min(max_running * of_context, kv_bytes // block_bytes)


def key_value_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key-value heads and values a head of each layer."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _read(states_GSK: Tensor, extents: Sequence[Extent]) -> Tensor:
    """(1, G, tokens, K): in place where it is one run."""
    if len(extents) == 1:
        begin, end = extents[0]
        return states_GSK[None, :, begin:end]
    return torch.cat([states_GSK[:, begin:end] for begin, end in extents], dim=1)[None]
