"""The check that a model's stages are the model."""

from __future__ import annotations

from time import perf_counter

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from lemix_common.errors import ModelError
from lemix_stage_worker.model.self_check import check_family, tiny_config, tiny_model
from numerics.subjects import GENERATED, Subject

CAN_BE_CUT = (
    *GENERATED.values(),
    Qwen3Config(),
    Gemma3TextConfig(),
    GraniteConfig(residual_multiplier=0.3, attention_multiplier=0.02),
)
CANNOT_BE_CUT = (
    Gemma2Config(),
    CohereConfig(logit_scale=0.1),
    GraniteConfig(logits_scaling=8.0),
    GraniteConfig(embedding_multiplier=12.0),
)


def test_the_models_under_test_pass_quickly(subject: Subject) -> None:
    """The check takes less than a second, whatever the model's size, and leaves the random generator alone."""
    state = torch.random.get_rng_state()
    start = perf_counter()
    check_family(subject.source)
    assert perf_counter() - start < 1
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("config", CAN_BE_CUT, ids=lambda config: config.model_type)
def test_families_built_like_llama_or_gpt2_pass(config: PreTrainedConfig) -> None:
    """Grouped heads, biases, norms of queries, windows and scaled embeddings make no difference."""
    check_family(tiny_model(config))


@pytest.mark.parametrize("config", CANNOT_BE_CUT, ids=lambda config: config.model_type)
def test_what_is_computed_between_the_parts_is_found(config: PreTrainedConfig) -> None:
    """Scaled embeddings in the base's forward, scaled or capped logits: refused, not silently wrong."""
    with pytest.raises(
        ModelError, match=f"{config.model_type!r} can't be cut into stages: logits of 2 stages"
    ):
        check_family(tiny_model(config))


def test_a_tiny_config_keeps_what_matters() -> None:
    """Heads keep their size and grouping, and every kind of layer stays; only sizes shrink."""
    config = tiny_config(Gemma3TextConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=16))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers
