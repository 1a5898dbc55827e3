"""The models that the numerics tests cut: two trained ones, where they are there, and small random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lemix_stage_worker.model.skeleton import build_skeleton
from lemix_stage_worker.model.source import ModelSource

REAL_MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
TRAINED = ("stories260K-hf", "gpt2-shakespeare-own")

GENERATED: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_positions=64,
        vocab_size=61,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "mistral": MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=61,
        max_position_embeddings=64,
        sliding_window=5,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=61,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, opened by us and loaded whole by transformers."""

    source: ModelSource
    whole: PreTrainedModel
    ids: Tensor
    """Two random sequences of 24 tokens (B, T)."""


def random_tensors(config: PreTrainedConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Float32 values for every parameter of a config's model; a tied head is left out."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(spec.shape).normal_(std=0.3, generator=generator)
        for name, spec in build_skeleton(config, torch.float32).specs.items()
    }


def write_model(folder: Path, config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> Path:
    """A model folder as `save_pretrained` writes it."""
    config.save_pretrained(folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
