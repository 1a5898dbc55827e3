"""A model folder, opened: its config, its names, and its tensors on demand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lemix_common.errors import ModelError
from lemix_stage_worker.device import CPU
from lemix_stage_worker.model.families import Family
from lemix_stage_worker.model.skeleton import HEAD_WEIGHT, Skeleton, build_skeleton, reason
from lemix_stage_worker.model.weights import TensorSpec, Weights, open_weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSource:
    """What a stage is built from; every tensor it promises is there, with the right shape."""

    config: PreTrainedConfig
    family: Family
    dtype: torch.dtype
    """Parameters are read as this type."""
    device: torch.device = CPU
    """Parameters are read onto it, and stages of the model compute on it."""
    specs: Mapping[str, TensorSpec]
    """Every parameter by its global name, in model order; a tied head is left out."""
    embedding_name: str
    is_tied: bool
    """The head's values are the embedding's."""
    eos_ids: tuple[int, ...]
    """Tokens that end a generation, ascending; none if the model names none."""
    weights: Weights
    stored_names: Mapping[str, str]
    """What the weights call each parameter (old checkpoints leave the base's prefix out)."""

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return self.specs[self.embedding_name].shape[0]

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, of one item."""
        return int(self.config.max_position_embeddings)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    def layer_prefix(self, layer: int) -> str:
        """What the global names of one layer's parameters begin with."""
        base = self.embedding_name.removesuffix(f"{self.family.embedding}.weight")
        return f"{base}{self.family.layers}.{layer}."

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named parameters on the device, and only they."""
        stored = {name: self.stored_names[name] for name in names}
        tensors = self.weights.read(stored.values())
        return {
            name: tensors.pop(stored_as).to(self.device, self.dtype) for name, stored_as in stored.items()
        }


def dtype_named(name: str) -> torch.dtype | None:
    """The type that a setting names; None for an empty one, which leaves it to the model."""
    return {
        "": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }[name]


def open_model(path: Path, *, dtype: torch.dtype | None = None, device: torch.device = CPU) -> ModelSource:
    """Open a local Hugging Face folder; only headers are read, and no code of the folder is ever run.

    `dtype` defaults to the config's. A folder that is missing or damaged, lacks tensors, or holds a model that can't
    be cut is a `ModelError`.
    """
    config = _read_config(path)
    return describe_model(
        config,
        open_weights(path),
        eos_ids=_eos_ids(path, config),
        dtype=dtype,
        device=device,
        where=str(path),
    )


def describe_model(
    config: PreTrainedConfig,
    weights: Weights,
    *,
    eos_ids: tuple[int, ...] = (),
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    where: str = "these weights",
) -> ModelSource:
    """Match a config with weights, by names and shapes; `where` names the weights in a `ModelError`."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{where} is quantized: give the model in float32, float16 or bfloat16")
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise ModelError(f"the config of {where} doesn't say max_position_embeddings, the longest context")
    stored = weights.specs
    dtype = dtype or _config_dtype(config) or _first_dtype(stored)
    skeleton = build_skeleton(config, dtype)
    if _wants_tying(config) and not _has_one_value(skeleton, weights):
        config.tie_word_embeddings = False  # as transformers does: the values win over the config
        skeleton = build_skeleton(config, dtype)
    stored_names = {name: _stored_name(name, skeleton, stored) for name in skeleton.specs}
    _check_shapes(skeleton.specs, stored_names, stored, where)
    return ModelSource(
        config=config,
        family=skeleton.family,
        dtype=dtype,
        device=device,
        specs=skeleton.specs,
        embedding_name=skeleton.embedding_name,
        is_tied=_wants_tying(config),
        eos_ids=eos_ids,
        weights=weights,
        stored_names=stored_names,
    )


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give the folder of a Hugging Face model")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise ModelError(f"{path / 'config.json'} can't be used: {reason(error)}") from error
    return config


def _eos_ids(path: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """The generation config's end-of-sequence ids, else the config's."""
    eos = getattr(config, "eos_token_id", None)
    generation = path / "generation_config.json"
    if generation.is_file():
        try:
            eos = json.loads(generation.read_bytes()).get("eos_token_id", eos)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{generation} is not a JSON object: copy the model folder again") from error
    return tuple(
        sorted({int(token) for token in (eos if isinstance(eos, list) else [eos]) if token is not None})
    )


def _config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _first_dtype(stored: Mapping[str, TensorSpec]) -> torch.dtype:
    return next((spec.dtype for spec in stored.values() if spec.dtype.is_floating_point), torch.float32)


def _wants_tying(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _has_one_value(skeleton: Skeleton, weights: Weights) -> bool:
    """Whether the weights hold the embedding only, the head only, or both with equal values."""
    embedding = _stored_name(skeleton.embedding_name, skeleton, weights.specs)
    if not {embedding, HEAD_WEIGHT} <= weights.specs.keys() or embedding == HEAD_WEIGHT:
        return True
    tensors = weights.read([embedding, HEAD_WEIGHT])
    return torch.equal(tensors[embedding], tensors[HEAD_WEIGHT])


def _stored_name(name: str, skeleton: Skeleton, stored: Mapping[str, TensorSpec]) -> str:
    """What the weights call a parameter: its name, or without the base's prefix, or (tied) the head's name."""
    is_tied_embedding = name == skeleton.embedding_name and HEAD_WEIGHT not in skeleton.specs
    names = [name, name.removeprefix(f"{skeleton.prefix}."), *([HEAD_WEIGHT] if is_tied_embedding else [])]
    return next((candidate for candidate in names if candidate in stored), name)


def _check_shapes(
    specs: Mapping[str, TensorSpec],
    stored_names: Mapping[str, str],
    stored: Mapping[str, TensorSpec],
    where: str,
) -> None:
    if missing := [name for name, stored_as in stored_names.items() if stored_as not in stored]:
        raise ModelError(
            f"{where} lacks {len(missing)} of {len(specs)} tensors that its config asks for, first {missing[0]}: "
            "copy the model folder again"
        )
    for name, stored_as in stored_names.items():
        expected, found = specs[name], stored[stored_as]
        if found.shape != expected.shape:
            raise ModelError(
                f"{where} stores {stored_as} as {list(found.shape)} where its config asks for {list(expected.shape)}: "
                "config.json and the weights are of different models"
            )
        if found.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ModelError(
                f"{where} stores {stored_as} as {found.dtype}: give float32, float16 or bfloat16 weights"
            )
