"""Where a worker computes: the processor, or one of the machine's GPUs, which it may share with other workers.

A GPU does what it is told later than it is told. So whoever measures how long something took, or must know that it is
over, waits for the device first (`wait_for`); on the processor that is nothing.

Training is replayed after a failure, and a version's name promises its bits. So on a GPU, too, sums are added in a
fixed order (torch's deterministic algorithms), products of float32 are float32's (no TF32), and those of bfloat16 are
added up in float32. Equal bits are promised on one kind of GPU, not between a GPU and a processor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
import torch.utils.deterministic

from lemix_common.errors import SettingsError
from lemix_common.machine import memory_limit_bytes, resident_bytes
from lemix_common.settings import EMULATED

CPU: Final = torch.device("cpu")
ENVIRONMENT: Final[Mapping[str, str]] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS may add in another order each time
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",  # half a megabyte each, for every shape that was met
    "LRU_CACHE_CAPACITY": "256",  # torch's own, of the same
}
"""What a process that computes has to have before it begins to."""


def choose_device(asked: str, slot: str) -> torch.device:
    """The device that the setting means for the worker of a slot; `SettingsError` where there is none such.

    ``cuda`` deals the machine's GPUs out to the slots by their numbers; ``auto`` does so where there are any.
    """
    if asked == "cpu" or asked.startswith(EMULATED):
        return CPU
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto" and not num_gpus:
        return CPU
    if not num_gpus:
        raise SettingsError(
            f"device = {asked}: torch {torch.__version__} finds no GPU here; use another device, or a build of torch "
            "for this machine's GPU and its driver"
        )
    _, _, named = asked.partition(":")
    index = int(named) if named else _number(slot) % num_gpus
    if index >= num_gpus:
        raise SettingsError(f"device = {asked}: this machine has {num_gpus} GPUs, from cuda:0 on")
    return torch.device("cuda", index)


def prepare(device: torch.device) -> torch.device:
    """Have torch compute on it exactly and repeatably from now on, in the whole process, whose environment is set."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.use_deterministic_algorithms(mode=True)
        # nobody reads what wasn't written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is assigned to
    return device


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def device_text(device: torch.device) -> str:
    """For an operator: ``cpu``, or a GPU's number and name."""
    return str(device) if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"


def device_memory_bytes(device: torch.device) -> int:
    """The most that all processes may have of its memory."""
    if device.type == "cpu":
        return memory_limit_bytes()
    return int(torch.cuda.get_device_properties(device).total_memory)


def used_memory_bytes(device: torch.device) -> int:
    """What this process has of it: on a GPU what torch's allocator holds, in use or for later use."""
    return resident_bytes() if device.type == "cpu" else int(torch.cuda.memory_reserved(device))


def _number(slot: str) -> int:
    """The number that a slot's name ends with; 0 without one."""
    found = re.search(r"\d+$", slot)
    return int(found[0]) if found else 0
