"""A model folder, checked at the border: what can be known without torch is known before any process starts.

The stage workers check the rest (names and shapes of the tensors, the family's structure) when they load their layers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lemix.weight_files import weight_files
from lemix_common.errors import ModelError
from lemix_common.tensorfiles import stored_tensors

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HUB_FILES = ("*.json", "*.safetensors")
_LAYERS = ("num_hidden_layers", "n_layer")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a cluster and its clients need to know of a model."""

    path: Path
    family: str
    context_length: int
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Tokens that end a generation, ascending."""
    num_layers: int
    tokenizer: str
    """The text of tokenizer.json."""

    def fields(self) -> dict[str, object]:
        """As the readable fields of the cluster's ``model`` hash."""
        return {
            "path": self.path,
            "family": self.family,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "bos_token_id": "" if self.bos_token_id is None else self.bos_token_id,
            "eos_token_ids": json.dumps(self.eos_token_ids),
            "num_layers": self.num_layers,
            "tokenizer_sha256": hashlib.sha256(self.tokenizer.encode()).hexdigest(),
        }


def open_model_folder(model: str, *, stages: int) -> ModelFolder:
    """Check a local folder or hub id for a cut into ``stages``; a `ModelError` says what is wrong and what to do."""
    path = find_folder(model)
    config = _read_object(path / "config.json", "give the folder of a Hugging Face model")
    if "quantization_config" in config:
        raise ModelError(f"{path} is quantized: give the model in float32, float16 or bfloat16")
    num_layers = _number(path, config, _LAYERS)
    if stages > num_layers:
        raise ModelError(
            f"{path} has {num_layers} layers, which can't be cut into {stages} stages: "
            f"choose 1 to {num_layers} stages"
        )
    if not sum(len(stored_tensors(file)) for file in weight_files(path)):
        raise ModelError(f"{path} has weight files without a tensor in them: copy the model folder again")
    generation = path / "generation_config.json"
    ends = config | (_read_object(generation, "copy the model folder again") if generation.exists() else {})
    return ModelFolder(
        path=path,
        family=str(config.get("model_type", "")),
        context_length=_number(path, config, _CONTEXT),
        vocab_size=_number(path, config, ("vocab_size",)),
        bos_token_id=next(iter(_token_ids(path, ends, "bos_token_id")), None),
        eos_token_ids=_token_ids(path, ends, "eos_token_id"),
        num_layers=num_layers,
        tokenizer=_read_tokenizer(path / "tokenizer.json"),
    )


def find_folder(model: str) -> Path:
    """The local folder of a model, fetched from the hub if it is a hub id and no folder."""
    if not model:
        raise ModelError("no model given: add --model with the folder of a Hugging Face model, or its hub id")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{model} is a file: give the folder that holds the model's config.json")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"{model}: there is no such folder; give the folder of a Hugging Face model, or its hub id"
        )
    return _fetch(model)


def _fetch(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"{model}: there is no such folder, and fetching it from the hub needs huggingface_hub: "
            "pip install 'lemix[worker]'"
        ) from None
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # whatever the hub's client meets: no network, no such model, no permission
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{model}: there is no such folder, and the hub didn't give a model of this name ({reason})"
        ) from error


def _read_object(file: Path, what_to_do: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file.parent} has no {file.name}: {what_to_do}") from None
    except OSError as error:
        raise ModelError(f"{file} can't be read ({error.strerror}): check its owner and mode") from None
    except ValueError as error:
        raise ModelError(f"{file} is not JSON ({error}): copy the model folder again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object: {what_to_do}")
    return content


def _number(path: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of these names that the config has; families spell them differently."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(
        f"{path / 'config.json'} doesn't say {' or '.join(names)}: give the folder of a decoder language model"
    )


def _token_ids(path: Path, config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{path}: {name} = {value!r} is not a token id: copy the model folder again")
    return tuple(sorted(set(ids)))


def _read_tokenizer(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{file.parent} has no {file.name}: save the model's fast tokenizer there (save_pretrained writes it)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} can't be read ({error}): copy it again") from None
    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        raise ModelError(f"{file} is not a tokenizer ({error}): copy it again") from None
    return text
