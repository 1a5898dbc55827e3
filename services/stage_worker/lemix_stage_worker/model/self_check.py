"""Proof, before a model is accepted, that its stages compute what the whole model computes.

A tiny random copy of the model (the same code, small sizes) runs whole and cut, as training and as serving run it: with
a backward, and in chunks beside others' with keys and values in blocks. Structure says that a model can be taken apart;
only its numbers say that nothing happened between the parts (an embedding scaled in the base's forward, logits divided
after the head).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from lemix_common.errors import ModelError
from lemix_stage_worker.kv_blocks import num_blocks_for
from lemix_stage_worker.model.paged_attention import KeyValueCache
from lemix_stage_worker.model.paged_row import PagedRow
from lemix_stage_worker.model.skeleton import (
    HEAD_WEIGHT,
    build_skeleton,
    build_whole,
    reason,
    without_dropout,
)
from lemix_stage_worker.model.source import ModelSource, describe_model
from lemix_stage_worker.model.stage import StageCut, StageModel, build_stage
from lemix_stage_worker.model.weights import MemoryWeights

RELATIVE_TOLERANCE = 1e-5
_MODEL_CODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the code of a model that can't be cut may raise when it is tried."""
_LAYERS = 4
_CUTS = ((range(1), range(1, 4)), (range(1), range(1, 3), range(3, 4)))
_CHUNKS = (range(6), range(6, 7), range(7, 18), range(18, 19))
"""The third goes over the border of a block."""
_TOKENS = _CHUNKS[-1].stop
_BLOCKS = ((0, 3), (1, 2))
"""Of the two sequences: scattered, and in a row."""
_VERSION = "0.0"
_VOCABULARY = 32
_SEED = 0


def check_family(source: ModelSource) -> None:
    """Compare cuts of a tiny copy of the model with the tiny model whole; `ModelError` where they differ."""
    try:
        wrong = next(
            (
                f"{what} of {stages} stages"
                for stages, what, size in _differences(tiny_model(source.config))
                if not size <= RELATIVE_TOLERANCE
            ),
            None,
        )
    except _MODEL_CODE_ERRORS as error:
        raise ModelError(
            f"models of type {source.config.model_type!r} can't be cut into stages: {reason(error)}"
        ) from error
    if wrong is not None:
        raise ModelError(
            f"models of type {source.config.model_type!r} can't be cut into stages: {wrong} differ from the whole "
            "model's, so something is computed between its parts"
        )


def tiny_model(config: PreTrainedConfig) -> ModelSource:
    """A model of the same code in a few small layers, with fixed random float32 weights."""
    config = tiny_config(config)
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {
        name: torch.empty(spec.shape).normal_(std=0.3, generator=generator)
        for name, spec in build_skeleton(config, torch.float32).specs.items()
    }
    return describe_model(config, MemoryWeights(tensors), dtype=torch.float32)


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small copy: heads keep their size and grouping, and windows are shorter than the sequences of the check."""
    tiny = copy.deepcopy(config)
    is_grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if is_grouped else 2,
        "hidden_size": 2 * head_size,
        "intermediate_size": 48,
        "n_inner": None,
        "vocab_size": _VOCABULARY,
        "sliding_window": 4,
    }
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(tiny, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(tiny, name, None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        kinds = list(dict.fromkeys(layer_types))
        tiny.layer_types = [kinds[layer % len(kinds)] for layer in range(_LAYERS)]
    tiny.num_hidden_layers = _LAYERS
    return tiny


def run_stages(stages: Sequence[StageModel], ids_BT: Tensor, positions: Tensor) -> Tensor:
    """All stages one after another in this process: logits_BTV."""
    hidden = ids_BT
    for stage in stages:
        hidden = stage(hidden, positions)
    return stages[-1].logits(hidden)


def run_stages_paged(
    stages: Sequence[StageModel],
    caches: Sequence[KeyValueCache],
    ids_T: Tensor,
    rows: Sequence[PagedRow],
    version: str,
) -> Tensor:
    """All stages one after another in this process, on an iteration's tokens: logits_TV."""
    hidden = ids_T[None]
    for stage, cache in zip(stages, caches, strict=True):
        paged = cache.plan(rows, version)
        hidden = stage.run_paged(hidden, paged.positions_T, paged)
    return stages[-1].logits(hidden)[0]


def build_stages(source: ModelSource, ranges: Sequence[range]) -> tuple[StageModel, ...]:
    """Every stage of a cut, loaded, in this process; stages share no memory, tied ends neither."""
    stages = tuple(
        build_stage(source, StageCut(index, len(ranges), layers)) for index, layers in enumerate(ranges)
    )
    for stage in stages:
        stage.load(source.read(stage.parameter_names()))
    return stages


def gradients(stages: Sequence[StageModel], embedding_name: str) -> dict[str, Tensor]:
    """The gradients of all stages by global name, a tied head's added to the embedding's."""
    leaves = {name: leaf for stage in stages for name, leaf in stage.leaves().items()}
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if stages[-1].tied_head:
        found[embedding_name] = found[embedding_name] + found.pop(HEAD_WEIGHT)
    return found


def _differences(source: ModelSource) -> Iterator[tuple[int, str, float]]:
    """(number of stages, what was compared, relative difference)."""
    whole = _whole_model(source)
    generator = torch.Generator().manual_seed(_SEED)
    ids_BT = torch.randint(0, _VOCABULARY, (2, _TOKENS), generator=generator)
    positions_T = torch.arange(_TOKENS)
    logits_BTV = whole(input_ids=ids_BT, use_cache=False).logits
    torch.autograd.backward(logits_BTV.logsumexp(-1).sum())
    expected = {
        name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None
    }
    cached_BTV = _whole_in_chunks(whole, ids_BT)
    for ranges in _CUTS:
        stages = build_stages(source, ranges)
        found_BTV = run_stages(stages, ids_BT, positions_T)
        torch.autograd.backward(found_BTV.logsumexp(-1).sum())
        yield len(ranges), "logits", relative_difference(found_BTV, logits_BTV)
        yield len(ranges), "gradients", _worst(gradients(stages, source.embedding_name), expected)
        yield len(ranges), "logits in chunks", relative_difference(_in_chunks(stages, ids_BT), cached_BTV)
        yield len(ranges), "logits of packed rows", relative_difference(_packed(stages, ids_BT), logits_BTV)


def _whole_model(source: ModelSource) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # its initial values are drawn and overwritten
        whole = build_whole(without_dropout(source.config), torch.float32)
    whole.load_state_dict(source.read(source.parameter_names), strict=False)
    return whole


@torch.no_grad()
def _whole_in_chunks(whole: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    cache = DynamicCache(config=whole.config)
    chunks = [ids_BT[:, chunk.start : chunk.stop] for chunk in _CHUNKS]
    return torch.cat(
        [whole(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in chunks], dim=1
    )


@torch.no_grad()
def _in_chunks(stages: Sequence[StageModel], ids_BT: Tensor) -> Tensor:
    caches = [KeyValueCache.of(stage, sum(map(len, _BLOCKS))) for stage in stages]

    def logits_of(chunk: range) -> Tensor:
        rows = [
            PagedRow(start=chunk.start, length=len(chunk), blocks=blocks[: num_blocks_for(chunk.stop)])
            for blocks in _BLOCKS
        ]
        ids_T = ids_BT[:, chunk.start : chunk.stop].flatten()
        logits_TV = run_stages_paged(stages, caches, ids_T, rows, _VERSION)
        return logits_TV.view(len(_BLOCKS), len(chunk), -1)

    return torch.cat([logits_of(chunk) for chunk in _CHUNKS], dim=1)


@torch.no_grad()
def _packed(stages: Sequence[StageModel], ids_BT: Tensor) -> Tensor:
    """Both sequences in one row, apart again afterwards."""
    positions = torch.arange(_TOKENS).repeat(len(ids_BT))
    return run_stages(stages, ids_BT.reshape(1, -1), positions).reshape(*ids_BT.shape, -1)


def _worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    return max(relative_difference(found[name], expected[name]) for name in expected)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """norm(found − expected) ÷ norm(expected) over all values; equal tensors are 0 apart."""
    if torch.equal(found, expected):
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
