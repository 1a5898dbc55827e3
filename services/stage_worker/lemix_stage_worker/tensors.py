"""torch tensors as the buffers that travel, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lemix_common.wire import TensorBuffer

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_buffer(tensor: Tensor) -> TensorBuffer:
    """A view of the tensor's bytes (of a contiguous CPU copy, where it isn't one)."""
    tensor = tensor.detach().to("cpu").contiguous()
    raw = tensor.reshape(-1).view(torch.uint8).numpy().data
    return TensorBuffer(_NAMES[tensor.dtype], tuple(tensor.shape), raw)


def to_tensor(buffer: TensorBuffer) -> Tensor:
    """A tensor over the buffer's memory; the buffer must not be released while it is used."""
    if not buffer.data.nbytes:
        return torch.empty(buffer.shape, dtype=_DTYPES[buffer.dtype])
    flat = torch.frombuffer(buffer.data, dtype=torch.uint8)
    return flat.view(_DTYPES[buffer.dtype]).reshape(buffer.shape)
