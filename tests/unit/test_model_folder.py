"""What `lemix up` finds out about a model folder before it starts anything, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel

from lemix.model_folder import open_model_folder
from lemix.weight_files import INDEX, SINGLE, merge
from lemix_common.errors import ModelError
from lemix_common.tensorfiles import stored_tensors, weights_sha256

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "vocab_size": 10,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def safetensors(tensors: dict[str, bytes]) -> bytes:
    """A file of uint8 tensors."""
    entries, at = {}, 0
    for name, values in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [len(values)], "data_offsets": [at, at + len(values)]}
        at += len(values)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(tensors.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small whole model folder."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (path / SINGLE).write_bytes(safetensors({"a": b"1234", "b": b"56"}))
    tokenizers.Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    return path


def test_a_whole_folder_gives_what_clients_need(folder: Path) -> None:
    """The cluster's ``model`` hash says where, which family, how long, and with which tokenizer."""
    fields = open_model_folder(str(folder), stages=3).fields()
    assert fields | {"tokenizer_sha256": "…"} == {
        "path": folder,
        "family": "llama",
        "context_length": 64,
        "vocab_size": 10,
        "bos_token_id": 1,
        "eos_token_ids": "[2]",
        "num_layers": 3,
        "tokenizer_sha256": "…",
    }


def test_gpt2_spells_its_sizes_differently(folder: Path) -> None:
    """``n_layer`` and ``n_positions`` are read too, and no first token is no first token."""
    config = {
        "model_type": "gpt2",
        "n_layer": 6,
        "n_positions": 256,
        "vocab_size": 10,
        "eos_token_id": [4, 3],
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    model = open_model_folder(str(folder), stages=6)
    assert (model.num_layers, model.context_length, model.eos_token_ids) == (6, 256, (3, 4))
    assert model.fields()["bos_token_id"] == ""


def test_the_generation_config_says_what_ends_a_text(folder: Path) -> None:
    """Chat models name more ends in generation_config.json than in config.json."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}', "utf-8")
    assert open_model_folder(str(folder), stages=1).eos_token_ids == (5, 7)


def test_shards_are_found_through_the_index(folder: Path) -> None:
    """A model in several files is whole if each file that the index names is."""
    (folder / "one.safetensors").write_bytes((folder / SINGLE).read_bytes())
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ModelError, match=r"two\.safetensors.*can't be read"):
        open_model_folder(str(folder), stages=1)
    (folder / "two.safetensors").write_bytes(safetensors({"c": b"7"}))
    assert open_model_folder(str(folder), stages=1).num_layers == 3


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json: give the folder"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "config of an image model": (
        lambda f: (f / "config.json").write_text("{}"),
        "num_hidden_layers or n_layer",
    ),
    "quantized": (
        lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {}})),
        "is quantized: give the model in float32",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), r"has no model\.safetensors"),
    "pickled weights": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin only, which could run code",
    ),
    "cut weights": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-1]), "copy it again"),
    "cut header": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:20]), "copy it again"),
    "empty weights file": (lambda f: (f / SINGLE).write_bytes(b""), "copy it again"),
    "no tensors": (lambda f: (f / SINGLE).write_bytes(safetensors({})), "without a tensor"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json: save"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
    "tokenizer that is no text": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "can't be read"),
    "damaged generation config": (lambda f: (f / "generation_config.json").write_text("[1]"), "copy"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_sentence(folder: Path, damage: str) -> None:
    """Each damage is one `ModelError` that names the file and says what to do."""
    break_it, sentence = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=sentence) as error:
        open_model_folder(str(folder), stages=1)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_more_stages_than_layers(folder: Path) -> None:
    """The error says how many are possible."""
    with pytest.raises(ModelError, match="3 layers, which can't be cut into 4 stages: choose 1 to 3"):
        open_model_folder(str(folder), stages=4)


@pytest.mark.parametrize(
    ("model", "sentence"), [("", "no model given"), ("/no/such/folder", "no such folder")]
)
def test_no_folder(model: str, sentence: str) -> None:
    """A path that isn't there is said to be missing; the hub isn't asked for it."""
    with pytest.raises(ModelError, match=sentence):
        open_model_folder(model, stages=1)


def test_a_file_is_no_folder(folder: Path) -> None:
    """Giving the weights' file instead of its folder is a common slip."""
    with pytest.raises(ModelError, match="is a file: give the folder"):
        open_model_folder(str(folder / SINGLE), stages=1)


def test_merged_weights_are_the_same_weights(tmp_path: Path) -> None:
    """Stage shards become one file whose parameters have the bytes they had."""
    parts = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    parts[0].write_bytes(safetensors({"x": b"abc", "z": b"d"}))
    parts[1].write_bytes(safetensors({"y": b"efgh"}))
    merge(parts, tmp_path / "whole.safetensors")
    assert weights_sha256([tmp_path / "whole.safetensors"]) == weights_sha256(parts)
    assert stored_tensors(tmp_path / "whole.safetensors")[0].start % 8 == 0


def test_shards_that_overlap_are_not_merged(tmp_path: Path) -> None:
    """Two stages that wrote the same parameter can't be one model."""
    for name in ("0", "1"):
        (tmp_path / name).write_bytes(safetensors({"x": b"abc"}))
    with pytest.raises(ModelError, match="x is stored twice"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
