"""The tensors of a model by name, read from safetensors files one stage's worth at a time.

A safetensors file is eight bytes of header length, a JSON header (name, dtype, shape, byte range), then raw tensors.
Tensors are read into memory of torch's own, not mapped: a stage's memory is its shard, a file that is replaced under a
running worker can't kill it, and addresses are aligned to 64 bytes whatever the file (kernels round differently on
unaligned rows, so mapped weights would give a replica other bits than received ones).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lemix_common.errors import ModelError

MAX_HEADER_BYTES = 100_000_000

Value = TypeVar("Value")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """A set of named tensors that can be asked for its names without reading values."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's dtype and shape, by name."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, and only they; an unknown name is a `ModelError`."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryWeights:
    """Weights that are in memory already."""

    tensors: Mapping[str, Tensor]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: _entry(self.tensors, name, "these weights") for name in names}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes are."""

    spec: TensorSpec
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """The safetensors files of a folder: an index in memory, the values on disk."""

    folder: Path
    places: Mapping[str, _Place]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: place.spec for name, place in self.places.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {name: _entry(self.places, name, str(self.folder)) for name in names}
        tensors: dict[str, Tensor] = {}
        for path in sorted({place.file for place in wanted.values()}):
            try:
                with FileIO(path) as file:
                    for name, place in wanted.items():
                        if place.file == path:
                            tensors[name] = _read_tensor(file, place)
            except OSError as error:
                raise ModelError(f"{path} can't be read: {error.strerror}") from error
        return {name: tensors[name] for name in wanted}


def open_weights(path: Path) -> FolderWeights:
    """Index the safetensors files of a folder by their headers; no values are read.

    The files are `model.safetensors`, else those that `model.safetensors.index.json` names, else (a published weight
    version) all there are. A folder without any, a damaged file or a name stored twice is a `ModelError`.
    """
    places: dict[str, _Place] = {}
    for file in _weight_files(path):
        for name, place in _read_header(file).items():
            if name in places:
                raise ModelError(f"{path} stores {name} twice, in {places[name].file.name} and {file.name}")
            places[name] = place
    return FolderWeights(path, places)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    files = _indexed_files(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no *.safetensors file: give a folder with a model saved as safetensors"
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index: copy the model folder again") from error
    if outside := [name for name in names if Path(str(name)).name != name]:
        raise ModelError(f"{index} names {outside[0]!r}, which is not a file of its folder")
    return [index.with_name(name) for name in names]


def _read_header(path: Path) -> dict[str, _Place]:
    """The places of one file's tensors, after checking that the file holds all their bytes."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
        file_bytes = path.stat().st_size
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: copy the model folder again") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    if not header or len(header) < header_bytes:
        raise ModelError(f"{path} is truncated or not a safetensors file: copy it again")
    start = 8 + header_bytes
    try:
        entries: dict[str, dict[str, object]] = json.loads(header)
        entries.pop("__metadata__", None)
        places = {name: _place(path, entry, start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged safetensors header: copy it again") from error
    expected_bytes = max((place.offset + place.spec.num_bytes for place in places.values()), default=start)
    if file_bytes < expected_bytes:
        raise ModelError(f"{path} is truncated ({file_bytes} of {expected_bytes} bytes): copy it again")
    return places


def _place(path: Path, entry: Mapping[str, object], start: int) -> _Place:
    """One header entry; KeyError, TypeError or ValueError if it contradicts itself."""
    match entry:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(begin), int(end)]}:
            spec = TensorSpec(_DTYPES[dtype], tuple(size for size in sizes if isinstance(size, int)))
            if len(spec.shape) < len(sizes) or min([begin, *spec.shape]) < 0 or end - begin != spec.num_bytes:
                raise ValueError("the byte range doesn't fit the shape")
            return _Place(spec, path, start + begin)
        case _:
            raise ValueError("no dtype, shape or byte range")


def _read_tensor(file: FileIO, place: _Place) -> Tensor:
    tensor = torch.empty(place.spec.shape, dtype=place.spec.dtype)
    room = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(place.offset)
    while room.nbytes:
        count = file.readinto(room)
        if not count:
            raise ModelError(f"{place.file} became shorter while it was read: copy it again")
        room = room[count:]
    return tensor


def _entry(entries: Mapping[str, Value], name: str, where: str) -> Value:
    try:
        return entries[name]
    except KeyError:
        raise ModelError(f"{where} lacks the tensor {name}: is it another model's?") from None
