"""A stage's part of a checkpoint or published version, as durable safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_shard(directory: Path, stage: int, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Write ``weights-S.safetensors`` and, if need be, ``optimizer-S.safetensors``, synced; tells what it wrote."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {
        f"weights-{stage:03d}.safetensors": {
            n: t for n, t in tensors.items() if not n.startswith("optimizer.")
        },
        f"optimizer-{stage:03d}.safetensors": {
            n: t for n, t in tensors.items() if n.startswith("optimizer.")
        },
    }
    for name, part in parts.items():
        if part:
            _write(directory / name, part)
    return {
        "stage": stage,
        "files": [name for name, part in parts.items() if part],
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write beside, sync, rename: a file with this name is whole."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    partial.rename(path)
