"""Attention of many requests at once, each to its own past: keys and values in blocks, without padding.

An iteration's tokens, of however many requests, are one row for everything but attention. There each request's tokens
are looked at by themselves: they attend to the keys and values of its blocks, where theirs have just been written. A
run of blocks that lie next to each other is read where it is; only what is scattered is copied together first.

A GPU takes longer to be told of a small piece of work than to do it. There all rows of one token (decodes) are attended
to at once, their keys and values copied together.

This is the seam for other kernels: they'd take the same `PagedRow`s and the same cache.

Shapes: T tokens of an iteration, H heads, G key-value heads, K values a head, S slots (one a token) of the cache, R
rows of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from lemix_common.errors import ModelError
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for
from lemix_stage_worker.model.attention import BY_SEGMENTS
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageModel


class StaleBlock(Exception):
    """A block holds keys and values of other weights than those that want to read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRow:
    """Consecutive tokens of one sequence in an iteration."""

    start: int
    """The position of the first of them."""
    length: int
    blocks: tuple[int, ...]
    """The sequence's block table, up to its last token here."""

    @property
    def end(self) -> int:
        """Tokens of the sequence that are known after them."""
        return self.start + self.length


@dataclass(eq=False)
class KeyValueCache:
    """The keys and values of one stage's layers. Memory is taken as blocks are first written to."""

    keys_GSK: list[Tensor]
    """One a layer."""
    values_GSK: list[Tensor]
    versions: list[str] = field(init=False)
    """By block: the weights that computed what it holds."""
    gathers: bool = field(init=False)
    """Rows of one token are attended to at once."""

    def __post_init__(self) -> None:
        self.gathers = self.keys_GSK[0].device.type != "cpu"
        self.versions = [""] * (self.keys_GSK[0].shape[1] // BLOCK_TOKENS)

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
    lengths: list[int] = field(init=False)
    """Tokens of each row."""
    _extents: list[list[tuple[int, int]]] = field(init=False)
    """By row: the runs of slots, from and to, that hold its keys and values."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """By row and window; the same for all layers."""
    _tokens: _TokenRows | None = field(init=False)
    """The rows that are attended to at once."""

    def __post_init__(self) -> None:
        self.lengths = [row.length for row in self.rows]
        self._extents = [_extents(row) for row in self.rows]
        self._tokens = _token_rows(self.rows, self.slots_T.device) if self.cache.gathers else None

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
        heads, groups = query_HTK.shape[0], keys_GSK.shape[0]
        queries = torch.split_with_sizes(query_HTK[None], self.lengths, dim=2)
        at_once: dict[int, Tensor] = {}
        if self._tokens is not None:
            at_once = self._tokens.attend(query_HTK, keys_GSK, values_GSK, scale=scale, window=window)
        found: list[Tensor] = []
        for index, (row, extents, query) in enumerate(zip(self.rows, self._extents, queries, strict=True)):
            if index in at_once:
                found.append(at_once[index])
                continue
            is_token = row.length == 1
            if is_token and heads > groups:  # the heads of a group are as many queries to its keys
                query = query.view(1, groups, heads // groups, -1)  # noqa: PLW2901 - the same values
            is_plain = window is None or row.end <= window
            output = scaled_dot_product_attention(
                query,
                _read(keys_GSK, extents),
                _read(values_GSK, extents),
                attn_mask=None if is_plain and (is_token or row.start == 0) else self._mask(index, window),
                is_causal=is_plain and row.start == 0 and not is_token,
                scale=scale,
                enable_gqa=heads > groups and not is_token,
            )
            found.append(output.reshape(1, heads, 1, -1) if is_token else output)
        output_HTK = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        return output_HTK[0].transpose(0, 1)

    def _mask(self, index: int, window: int | None) -> Tensor:
        """Which keys a row's tokens may look at: (tokens, keys)."""
        if (index, window) not in self._masks:
            row, device = self.rows[index], self.slots_T.device
            behind = torch.arange(row.start, row.end, device=device)[:, None] - torch.arange(
                row.end, device=device
            )
            allowed = behind >= 0
            self._masks[index, window] = allowed if window is None else allowed & (behind < window)
        return self._masks[index, window]


@dataclass(frozen=True, slots=True, eq=False)
class _TokenRows:
    """Rows of one token, which are attended to at once."""

    indices: tuple[int, ...]
    """Which of the iteration's rows they are."""
    at_R: Tensor
    """Where they are among its tokens."""
    ends_R: Tensor
    slots_RS: Tensor
    """Of each one's keys; a shorter one's first again where it has none, so that nobody reads what isn't its own."""

    def attend(
        self,
        query_HTK: Tensor,
        keys_GSK: Tensor,
        values_GSK: Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> dict[int, Tensor]:
        """By row, what its token sees: (1, H, 1, K)."""
        heads, groups, size = query_HTK.shape[0], keys_GSK.shape[0], query_HTK.shape[2]
        position_S = torch.arange(self.slots_RS.shape[1], device=self.ends_R.device)
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
        rows = output.reshape(-1, 1, heads, 1, size).unbind()
        return dict(zip(self.indices, rows, strict=True))


def _token_rows(rows: Sequence[PagedRow], device: torch.device) -> _TokenRows | None:
    """Those of an iteration; None where there is no second one."""
    indices = tuple(index for index, row in enumerate(rows) if row.length == 1)
    if len(indices) < 2:  # one alone needs no copies
        return None
    starts = list(accumulate((row.length for row in rows), initial=0))
    most = max(len(rows[index].blocks) for index in indices)
    blocks_RN = torch.tensor([_padded(rows[index].blocks, most) for index in indices], device=device)
    ends_R = torch.tensor([rows[index].end for index in indices], device=device)
    slots_RS = (blocks_RN[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=device)).flatten(1)
    is_own_RS = torch.arange(slots_RS.shape[1], device=device) < ends_R[:, None]
    return _TokenRows(
        indices=indices,
        at_R=torch.tensor([starts[index] for index in indices], device=device),
        ends_R=ends_R,
        slots_RS=torch.where(is_own_RS, slots_RS, slots_RS[:, :1]),
    )


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    return [*blocks, *[0] * (length - len(blocks))]


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


def _extents(row: PagedRow) -> list[tuple[int, int]]:
    """Runs of neighbouring blocks as runs of slots, the last one up to the row's end."""
    breaks = [
        index for index, (before, block) in enumerate(pairwise(row.blocks), start=1) if block != before + 1
    ]
    runs = pairwise([0, *breaks, len(row.blocks)])
    return [
        (
            row.blocks[a] * BLOCK_TOKENS,
            row.blocks[a] * BLOCK_TOKENS + min(b * BLOCK_TOKENS, row.end) - a * BLOCK_TOKENS,
        )
        for a, b in runs
    ]


def _read(states_GSK: Tensor, extents: Sequence[tuple[int, int]]) -> Tensor:
    """(1, G, tokens, K): in place where it is one run."""
    if len(extents) == 1:
        begin, end = extents[0]
        return states_GSK[None, :, begin:end]
    return torch.cat([states_GSK[:, begin:end] for begin, end in extents], dim=1)[None]
