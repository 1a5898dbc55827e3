"""Which safetensors files make up a model, and how to make one of several; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lemix_common.errors import ModelError
from lemix_common.tensorfiles import StoredTensor, stored_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 1 << 20


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index says; `ModelError` if there are none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if other := sorted(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder} has its weights in {other[0].name} only, which could run code when read: "
            "save the model as safetensors (transformers' save_pretrained does)"
        )
    raise ModelError(f"{folder} has no {SINGLE}: give the folder of a model saved as safetensors")


def merge(files: Sequence[Path], target: Path) -> None:
    """Write one new file with the tensors of all; a name that is stored twice is a `ModelError`."""
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in files for tensor in stored_tensors(file)):
        if tensor.name in tensors:
            raise ModelError(
                f"{tensor.name} is stored twice, in {tensors[tensor.name].path} and {tensor.path}"
            )
        tensors[tensor.name] = tensor
    with target.open("xb") as out:
        out.write(_header(tensors))
        for tensor in tensors.values():
            with tensor.path.open("rb") as source:
                source.seek(tensor.start)
                _copy(source, out, tensor.num_bytes)


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not a safetensors index: copy the model folder again") from None
    for name in names:
        if Path(str(name)).name != name:
            raise ModelError(
                f"{index} names {name!r}, which is not a file of its folder: copy the folder again"
            )
    return [index.with_name(name) for name in names]


def _header(tensors: Mapping[str, StoredTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, out: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        piece = source.read(min(num_bytes, _PIECE_BYTES))
        out.write(piece)
        num_bytes -= len(piece)
