"""The folder of a model that is nobody's: what an emulated cluster has in place of the one whose profile it acts by.

It has a tokenizer, as many layers as there are stages, a context as long as the real one's, and next to no weights. Its
head isn't the embedding: the first and the last stage would have to exchange that one's gradients before each commit,
which profiles know nothing of.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Final

from lemix_studies.demo import MODEL

HIDDEN: Final = 8
_CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_stand_in(folder: Path, *, stages: int, context_length: int) -> Path:
    """Write it; its vocabulary is the demo's."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODEL / "tokenizer.json", folder / "tokenizer.json")
    vocab_size = json.loads((MODEL / "config.json").read_text("utf-8"))["vocab_size"]
    config = _CONFIG | {
        "vocab_size": vocab_size,
        "num_hidden_layers": stages,
        "max_position_embeddings": context_length,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    (folder / "model.safetensors").write_bytes(_zeros(_shapes(stages, vocab_size)))
    return folder


def _shapes(layers: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocab_size, HIDDEN),
    }
    for layer in range(layers):
        of_layer = {
            **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
            **{f"mlp.{part}_proj": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")},
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def _zeros(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Tensors of zeros in the safetensors format: the header's length, the header, the bytes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(end)
