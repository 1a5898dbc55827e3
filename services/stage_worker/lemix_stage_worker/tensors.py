"""torch tensors as the buffers that travel, and back: from a GPU and to it by way of pinned memory of the host.

Pinned memory is what a GPU copies from and to by itself. Torch keeps what was pinned for the next time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemix_common.wire import TensorBuffer
from lemix_stage_worker.device import wait_for

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_buffer(tensor: Tensor) -> TensorBuffer:
    """A view of the tensor's bytes (of a contiguous copy on the host, where it isn't one)."""
    tensor = _on_host(tensor.detach()).contiguous()
    raw = tensor.reshape(-1).view(torch.uint8).numpy().data
    return TensorBuffer(_NAMES[tensor.dtype], tuple(tensor.shape), raw)


def to_tensor(buffer: TensorBuffer) -> Tensor:
    """A tensor over the buffer's memory; the buffer must not be released while it is used."""
    if not buffer.data.nbytes:
        return torch.empty(buffer.shape, dtype=_DTYPES[buffer.dtype])
    flat = torch.frombuffer(buffer.data, dtype=torch.uint8)
    return flat.view(_DTYPES[buffer.dtype]).reshape(buffer.shape)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where it is to be computed with: itself if it is there already, else a copy.

    On return the memory it was copied from may be given back.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_on(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy, on the device."""
    return tensor.clone() if tensor.device == device else on_device(tensor, device)


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory, as far as it has been computed."""
    if tensor.device.type == "cpu":
        return tensor
    staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staging.copy_(tensor, non_blocking=True)
    wait_for(tensor.device)
    return staging
