"""Where the tests of numbers compute, in what precision, and how near is near enough there.

By default it is the CPU and float32, where much is asked to the bit. ``TEST_DEVICE=cuda`` asks the same of a GPU, and
``TEST_DTYPE=bfloat16`` of half precision (`docs/gpu.md` says what is near enough, and what was found). What is asked to
the bit of two ways through the same kernels stays so everywhere; what goes through other kernels, or through the same
ones in other shapes, may differ by the device's and the type's rounding.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

import pytest
import torch
from torch import Tensor

from lemix_common.settings import ClusterSettings
from lemix_stage_worker.device import ENVIRONMENT, choose_device, prepare

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

os.environ.update(ENVIRONMENT)
DEVICE: Final = prepare(choose_device(os.environ.get("TEST_DEVICE", "cpu"), ""))
DTYPE: Final = _DTYPES[os.environ.get("TEST_DTYPE", "float32")]
IS_GPU: Final = DEVICE.type == "cuda"
IS_HALF: Final = DTYPE.itemsize < torch.float32.itemsize

NEAR_TIE: Final = 0.25 if IS_HALF else 1e-3
"""Where the two best logits are closer than this, another sum's rounding may choose the other token."""
TIED_SHARE: Final = 0.1 if IS_HALF else 1e-3
"""Of the tokens that may be such."""

cpu_only = pytest.mark.skipif(IS_GPU, reason="it is about the CPU")
float32_only = pytest.mark.skipif(IS_HALF, reason="it is about float32; bfloat16 has a test of its own")


def within(limit: float) -> float:
    """What a relative difference may be where the CPU in float32 keeps ``limit``."""
    if IS_HALF:
        return max(limit, 3e-2)
    return max(limit, 1e-5) if IS_GPU else limit


def arange(*borders: int) -> Tensor:
    """`torch.arange` on the device."""
    return torch.arange(*borders, device=DEVICE)


def on_test_device(settings: ClusterSettings) -> ClusterSettings:
    """The same cluster, there and in that precision, unless it names its own."""
    dtype = str(DTYPE).removeprefix("torch.") if IS_HALF and not settings.dtype else settings.dtype
    device = settings.device if settings.emulated_profile else str(DEVICE)
    return replace(settings, device=device, dtype=dtype)
