"""The models that benches run: random weights of a real shape, written as a Hugging Face folder.

``bench-34m`` is for processors; ``llama-1b`` has the shape of TinyLlama (1.1 billion parameters, in bfloat16).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lemix_common.errors import ModelError

BENCH_MODEL: Final = "bench-34m"
VOCABULARY: Final = 8_192
"""Of what is made up: every model has these tokens."""
CONTEXT: Final = 2_048
_SPECIAL: Final = ("<s>", "</s>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's, and the number of parameters that it must come to."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    dtype: torch.dtype
    num_parameters: int


MODELS: Final = {
    BENCH_MODEL: Shape(
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        dtype=torch.float32,
        num_parameters=33_694_208,
    ),
    "llama-1b": Shape(
        hidden_size=2_048,
        intermediate_size=5_632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
        dtype=torch.bfloat16,
        num_parameters=1_100_048_384,
    ),
}


def write_bench_model(folder: Path) -> Path:
    """Write the model that the folder is named after into it; always the same weights (seed 0)."""
    shape = MODELS[folder.name]
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype=str(shape.dtype).removeprefix("torch."),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(shape.dtype)
    check_bench_model(model, folder.name)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def read_bench_model(folder: Path) -> PreTrainedModel:
    """The whole model, as its peers run it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder, dtype=MODELS[folder.name].dtype)
    check_bench_model(model, folder.name)
    return model


def check_bench_model(model: PreTrainedModel, name: str) -> None:
    """Figures of another model than the one they name would mean nothing."""
    found, expected = sum(parameter.numel() for parameter in model.parameters()), MODELS[name].num_parameters
    if found != expected:
        raise ModelError(f"{name} has {expected:,} parameters, this model {found:,}")


def _tokenizer() -> Tokenizer:
    """A token a byte: any text has tokens."""
    letters = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
