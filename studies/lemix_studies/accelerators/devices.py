"""Accelerators, by their makers' data sheets, and what share of a sheet's figures programs reach.

A sheet's peak is a bound. Matrix products of some hundred rows reach half of it (Llama-2 on A100s: 40 to 60 % in
published traces), reading weights and caches in a row four fifths of the memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

COMPUTE_EFFICIENCY: Final = 0.5
BANDWIDTH_EFFICIENCY: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator; the first three are a sheet's figures."""

    peak_flops: float
    """bfloat16 with float32 sums, dense, a second."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """NVLink, in one direction."""
    memory_bytes: int

    @property
    def flops(self) -> float:
        """What matrix products reach, a second."""
        return COMPUTE_EFFICIENCY * self.peak_flops

    @property
    def read_bytes_per_second(self) -> float:
        """What reading or writing in a row reaches."""
        return BANDWIDTH_EFFICIENCY * self.memory_bytes_per_second

    @property
    def hop_bytes_per_second(self) -> float:
        """What sending to a neighbour reaches."""
        return BANDWIDTH_EFFICIENCY * self.link_bytes_per_second


DEVICES: Final[Mapping[str, Device]] = {
    "a100-80g": Device(
        peak_flops=312e12,
        memory_bytes_per_second=2.039e12,
        link_bytes_per_second=300e9,
        memory_bytes=80 * 2**30,
    ),
    "h100": Device(
        peak_flops=989e12,
        memory_bytes_per_second=3.35e12,
        link_bytes_per_second=450e9,
        memory_bytes=80 * 2**30,
    ),
}
"""SXM modules."""
