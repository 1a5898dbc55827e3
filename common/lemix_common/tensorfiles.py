"""safetensors files without torch: headers, raw bytes, and the hash that names weights.

A file is eight bytes of header length, a JSON header (name to dtype, shape and offsets), then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lemix_common.errors import ModelError

_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in name order; `ModelError` if it is no complete safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ModelError(
                    f"{path}: not a safetensors file, or cut off within its header; copy it again"
                )
            header = json.loads(file.read(length))
        tensors = [
            StoredTensor(path, name, about["dtype"], tuple(about["shape"]), 8 + length + first, last - first)
            for name, about in sorted(header.items())
            if name != "__metadata__"
            for first, last in [about["data_offsets"]]
        ]
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: its safetensors header can't be read ({error}); copy it again") from None
    end = max((tensor.start + tensor.num_bytes for tensor in tensors), default=8 + length)
    if end != size:
        raise ModelError(
            f"{path}: truncated or padded: {size} bytes, but its header speaks of {end}; copy it again"
        )
    return tensors


def weights_sha256(paths: Iterable[Path]) -> str:
    """sha256 over the raw bytes of all parameters in name order, however they are spread over files."""
    tensors = sorted((t for path in paths for t in stored_tensors(path)), key=lambda tensor: tensor.name)
    digest = hashlib.sha256()
    for tensor in tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.num_bytes
            while left:
                piece = file.read(min(left, _PIECE))
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
