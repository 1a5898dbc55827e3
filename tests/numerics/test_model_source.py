"""Opening model folders, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, MambaConfig, MixtralConfig, PreTrainedConfig, T5Config

from devices import DTYPE
from lemix_common.errors import ModelError
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.model.weights import MemoryWeights, TensorSpec, open_weights
from numerics.subjects import GENERATED, Subject, random_tensors, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _edit_config(folder: Path, **changes: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def _edit_header(file: Path, edit: Callable[[bytes], bytes]) -> None:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = edit(content[8:end])
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def test_a_source_describes_its_model(subject: Subject) -> None:
    """Names, shapes and limits are those of the model that transformers loads."""
    source, config = subject.source, subject.whole.config
    assert source.parameter_names == tuple(name for name, _ in subject.whole.named_parameters())
    assert (source.num_layers, source.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert (source.vocab_size, source.context_length) == (config.vocab_size, config.max_position_embeddings)
    assert source.is_tied == config.tie_word_embeddings
    assert source.eos_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    assert source.dtype == DTYPE


def test_reading_gives_the_named_tensors_and_only_they(subject: Subject) -> None:
    """Values equal what transformers loads, in the order asked for, at addresses divisible by 64."""
    names = subject.source.parameter_names[5:2:-1]
    tensors = subject.source.read(names)
    assert tuple(tensors) == names
    for name, tensor in tensors.items():
        assert torch.equal(tensor, subject.whole.get_parameter(name))
        assert tensor.data_ptr() % 64 == 0


def test_an_indexed_model_reads_from_its_shards(tmp_path: Path) -> None:
    """A model in several files is found through its index; files that the index doesn't name are ignored."""
    tensors = random_tensors(GENERATED["llama"])
    names = list(tensors)
    GENERATED["llama"].save_pretrained(tmp_path)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_model(tmp_path).read(names)
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_a_version_folder_is_all_its_shards(tmp_path: Path) -> None:
    """A published weight version has no config and no index: what its files hold is what there is."""
    save_file({"one": torch.arange(3.0)}, tmp_path / "stage-0.safetensors")
    save_file({"two": torch.tensor(7.0), "none": torch.empty(0, 4)}, tmp_path / "stage-1.safetensors")
    weights = open_weights(tmp_path)
    assert weights.specs == {
        "one": TensorSpec(torch.float32, (3,)),
        "two": TensorSpec(torch.float32, ()),
        "none": TensorSpec(torch.float32, (0, 4)),
    }
    found = weights.read(["two", "none", "one"])
    assert list(found) == ["two", "none", "one"]
    assert (found["one"].tolist(), found["two"].item()) == ([0.0, 1.0, 2.0], 7.0)
    save_file({"one": torch.zeros(1)}, tmp_path / "stage-2.safetensors")
    with pytest.raises(ModelError, match="stores one twice, in stage-0"):
        open_weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])
def test_every_common_type_is_read_as_its_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    """No value passes through another type on its way."""
    tensor = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    found = open_weights(tmp_path).read(["x"])["x"]
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_weights_in_memory_are_weights_too() -> None:
    """The in-memory twin has the same names, shapes and refusal."""
    weights = MemoryWeights({"x": torch.ones(2)})
    assert weights.specs == {"x": TensorSpec(torch.float32, (2,))}
    assert weights.read(["x"])["x"].tolist() == [1.0, 1.0]
    with pytest.raises(ModelError, match="lacks the tensor y"):
        weights.read(["y"])


def test_old_checkpoints_leave_the_prefix_out(tmp_path: Path) -> None:
    """GPT-2's own files say `wte.weight`; its global name is `transformer.wte.weight` all the same."""
    tensors = random_tensors(GENERATED["gpt2"])
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(4, 4, dtype=torch.uint8)
    source = open_model(write_model(tmp_path, GENERATED["gpt2"], bare))
    found = source.read(source.parameter_names)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("stored", "is_tied"),
    [
        ({EMBEDDING: 1.0}, True),
        ({HEAD: 1.0}, True),
        ({EMBEDDING: 1.0, HEAD: 1.0}, True),
        ({EMBEDDING: 1.0, HEAD: 2.0}, False),
    ],
    ids=["embedding only", "head only", "both, equal", "both, different"],
)
def test_tying_follows_the_values(tmp_path: Path, stored: Mapping[str, float], is_tied: object) -> None:
    """As in transformers: a tied model may store either name or both, and different values win over the config."""
    config = GENERATED["qwen2"]
    tensors = random_tensors(config)
    embedding = tensors.pop(EMBEDDING)
    folder = write_model(
        tmp_path, config, {**tensors, **{name: embedding * factor for name, factor in stored.items()}}
    )
    source = open_model(folder)
    assert source.is_tied == is_tied
    assert torch.equal(source.read([EMBEDDING])[EMBEDDING], embedding)
    if not is_tied:
        assert torch.equal(source.read([HEAD])[HEAD], embedding * 2)


def test_the_generation_config_says_what_ends_a_text(llama_folder: Path) -> None:
    """Its end-of-sequence ids, one or several or none, come before the config's."""
    for eos, expected in ((7, (7,)), ([9, 3], (3, 9)), (None, ())):
        (llama_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert open_model(llama_folder).eos_ids == expected
    (llama_folder / "generation_config.json").unlink()
    _edit_config(llama_folder, eos_token_id=[5, 4])
    assert open_model(llama_folder).eos_ids == (4, 5)


def test_the_type_is_the_configs_or_the_weights_or_the_callers(llama_folder: Path) -> None:
    """Parameters are read as the caller's type, else the config's, else the stored one."""
    _edit_config(llama_folder, dtype=None)
    assert open_model(llama_folder).dtype == torch.float32
    _edit_config(llama_folder, dtype="bfloat16")
    assert open_model(llama_folder).dtype == torch.bfloat16
    source = open_model(llama_folder, dtype=torch.float64)
    assert source.read([HEAD])[HEAD].dtype == torch.float64


def test_code_in_the_folder_is_never_run(llama_folder: Path) -> None:
    """A config that points to Python files of its own is read as the known family, or refused."""
    (llama_folder / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    _edit_config(llama_folder, auto_map=auto_map)
    assert open_model(llama_folder).num_layers == 5
    _edit_config(llama_folder, auto_map=auto_map, model_type="evil")
    with pytest.raises(ModelError, match=r"config\.json can't be used"):
        open_model(llama_folder)


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _cut_the_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])


def _claim_a_huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 16)


def _break_the_header(folder: Path) -> None:
    _edit_header(folder / "model.safetensors", lambda header: header.replace(b"{", b"[", 1))


def _name_an_unknown_type(folder: Path) -> None:
    _edit_header(folder / "model.safetensors", lambda header: header.replace(b'"F32"', b'"Q99"'))


def _shift_a_range(folder: Path) -> None:
    _edit_header(folder / "model.safetensors", lambda header: header.replace(b"[0,", b"[4,"))


def _remove_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _remove_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _drop_a_tensor(folder: Path) -> None:
    tensors = random_tensors(GENERATED["llama"])
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def _grow_the_vocabulary(folder: Path) -> None:
    _edit_config(folder, vocab_size=62)


def _store_integers(folder: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in random_tensors(GENERATED["llama"]).items()}
    save_file(tensors, folder / "model.safetensors")


def _quantize(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def _forget_the_context(folder: Path) -> None:
    _edit_config(folder, max_position_embeddings=None)


def _break_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def _index_a_missing_file(folder: Path) -> None:
    _remove_the_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')


def _index_a_file_elsewhere(folder: Path) -> None:
    _remove_the_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')


def _break_the_index(folder: Path) -> None:
    _remove_the_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


DAMAGES: Mapping[Callable[[Path], None], str] = {
    _cut_short: r"model.safetensors is truncated \(\d+ of \d+ bytes\): copy it again",
    _empty: r"model.safetensors is truncated or not a safetensors file",
    _cut_the_header: r"model.safetensors is truncated or not a safetensors file",
    _claim_a_huge_header: r"model.safetensors is truncated or not a safetensors file",
    _break_the_header: r"model.safetensors has a damaged safetensors header",
    _name_an_unknown_type: r"model.safetensors has a damaged safetensors header",
    _shift_a_range: r"model.safetensors has a damaged safetensors header",
    _remove_the_weights: r"has no .*safetensors file",
    _remove_the_config: r"has no config.json",
    _break_the_config: r"config.json can't be used",
    _drop_a_tensor: r"lacks 1 of 48 tensors that its config asks for, first model.norm.weight",
    _grow_the_vocabulary: r"embed_tokens.weight as \[61, 32\] where its config asks for \[62, 32\]",
    _store_integers: r"as torch.int8: give float32",
    _quantize: "is quantized",
    _forget_the_context: "max_position_embeddings",
    _break_the_generation_config: r"generation_config.json is not a JSON object",
    _index_a_missing_file: r"gone.safetensors is missing",
    _index_a_file_elsewhere: "which is not a file of its folder",
    _break_the_index: "is not a safetensors index",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__[1:])
def test_a_damaged_folder_is_refused_in_one_sentence(
    llama_folder: Path, damage: Callable[[Path], None]
) -> None:
    """What is wrong, where, and what to do: before any worker starts."""
    damage(llama_folder)
    with pytest.raises(ModelError, match=DAMAGES[damage]) as refusal:
        open_model(llama_folder)
    assert str(llama_folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_vanishes_after_opening_is_named(llama_folder: Path) -> None:
    """Weights are read when a stage is loaded; a file that is gone or shorter by then is refused the same way."""
    source = open_model(llama_folder)
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="became shorter"):
        source.read(source.parameter_names)
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors can't be read: No such file"):
        source.read(source.parameter_names)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(d_model=8, num_layers=1),
        MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9),
        BertConfig(hidden_size=12, num_hidden_layers=1, is_decoder=True),
        MixtralConfig(hidden_size=32, num_hidden_layers=1, num_local_experts=2, vocab_size=9),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_of_another_structure_is_refused(tmp_path: Path, config: PreTrainedConfig) -> None:
    """Encoders, state-space models and mixtures of experts are refused before a tensor is read."""
    folder = write_model(tmp_path, config, {"x": torch.ones(1)})
    with pytest.raises(ModelError) as refusal:
        open_model(folder)
    assert "\n" not in str(refusal.value)
