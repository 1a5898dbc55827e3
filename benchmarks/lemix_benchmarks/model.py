"""The model that benches run: ``bench-34m``, random weights of a real shape, written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lemix_common.errors import ModelError

BENCH_MODEL: Final = "bench-34m"
NUM_PARAMETERS: Final = 33_694_208
VOCABULARY: Final = 8_192
CONTEXT: Final = 2_048
_SPECIAL: Final = ("<s>", "</s>")


def write_bench_model(folder: Path) -> Path:
    """Write the model into a new folder; always the same weights (seed 0)."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1_376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    check_bench_model(model)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def read_bench_model(folder: Path) -> PreTrainedModel:
    """The whole model, as its peers run it."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_bench_model(model)
    return model


def check_bench_model(model: PreTrainedModel) -> None:
    """Figures of another model than the one they name would mean nothing."""
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != NUM_PARAMETERS:
        raise ModelError(f"{BENCH_MODEL} has {NUM_PARAMETERS:,} parameters, this model {found:,}")


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
