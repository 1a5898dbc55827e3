"""A whole model folder made of nothing: a Llama of a few thousand numbers, written without torch."""

from __future__ import annotations

import json
import math
import random
from array import array
from pathlib import Path

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ("<unk>", "<s>", "</s>", *"the a cat dog sat ran on under mat hill and then it was red".split())
HIDDEN, INNER, HEADS, CONTEXT = 16, 32, 2, 64


def write_tiny_llama(folder: Path, *, layers: int = 2, seed: int = 0, **config: object) -> Path:
    """Write config, weights and tokenizer; ``config`` replaces entries of config.json."""
    folder.mkdir(parents=True)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(described | config), "utf-8")
    (folder / "model.safetensors").write_bytes(_weights(layers, random.Random(seed)))
    tokenizer = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _weights(layers: int, random: random.Random) -> bytes:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(WORDS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
                **{f"mlp.{part}_proj": (INNER, HIDDEN) for part in ("gate", "up")},
                "mlp.down_proj": (HIDDEN, INNER),
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
            }.items()
        }
    entries, values = {}, array("f")
    for name, shape in shapes.items():
        at = 4 * len(values)
        size = math.prod(shape)
        values.extend([1.0] * size if len(shape) == 1 else (random.gauss(0.0, 0.2) for _ in range(size)))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, 4 * len(values)]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + values.tobytes()
