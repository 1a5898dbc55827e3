"""Attention of many rows of one token in one call, on a processor: each reads its keys and values where they are.

Torch's attention is asked once a row and layer, and takes twice as long as reading what is attended to; this takes as
long as reading (85 and 42 µs a row and layer with 8 heads of 64 values and 120 tokens, one thread of an AMD EPYC). The
loops below are compiled by numba when this module is first imported, and kept on disk where there is a place for it.

A row's tokens are taken a few at a time: what was summed up so far is scaled down when a higher product turns up, so
that one pass over keys and values is enough (the online softmax of Milakov & Gimelshein, "Online normalizer calculation
for softmax", 2018). A row's result doesn't depend on the others. Sums are added up in the order that suits the
processor; values that are not finite come out as such.

Shapes: T tokens of an iteration, H heads, G key-value heads, K values a head, S slots of the cache (one a token), R
rows of one token, E extents (runs of slots that hold a row's tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
import torch
from numba import float32, int64
from numpy.typing import NDArray
from torch import Tensor

_AT_ONCE: Final = 16
"""Tokens whose weights are known before their values are read."""
_LOWEST: Final = -3e38
"""Below all products: infinities would be more than the compiler may be told of."""
_REORDERED: Final = {"reassoc", "contract", "nsz", "arcp"}
"""Sums in vectors and fused products; what is not a number stays none."""


def _attend_in_place(  # noqa: PLR0912, PLR0913, PLR0917 - numba compiles one function of arrays
    query_HTK: NDArray[np.float32],
    keys_GSK: NDArray[np.float32],
    values_GSK: NDArray[np.float32],
    rows_R3: NDArray[np.int64],
    extents_E2: NDArray[np.int64],
    scale: float,
    output_THK: NDArray[np.float32],
) -> None:
    """See `attend_in_place`."""
    heads, size = query_HTK.shape[0], query_HTK.shape[2]
    heads_of_group = heads // keys_GSK.shape[0]
    query_K, output_K = np.empty(size, np.float32), np.empty(size, np.float32)
    weights = np.empty(_AT_ONCE, np.float32)
    for row in range(len(rows_R3)):
        token = rows_R3[row, 0]
        for head in range(heads):
            group = head // heads_of_group
            for k in range(size):
                query_K[k] = query_HTK[head, token, k] * scale
                output_K[k] = 0
            top, total = np.float32(_LOWEST), np.float32(0)
            for extent in range(rows_R3[row, 1], rows_R3[row, 2]):
                for begin in range(extents_E2[extent, 0], extents_E2[extent, 1], _AT_ONCE):
                    count = min(_AT_ONCE, extents_E2[extent, 1] - begin)
                    highest = top
                    for index in range(count):
                        product = np.float32(0)
                        for k in range(size):
                            product += query_K[k] * keys_GSK[group, begin + index, k]
                        weights[index] = product
                        highest = max(highest, product)
                    if highest > top:
                        kept = math.exp(top - highest)
                        top = highest
                        total *= kept
                        for k in range(size):
                            output_K[k] *= kept
                    for index in range(count):
                        weights[index] = math.exp(weights[index] - top)
                        total += weights[index]
                    for index in range(count):
                        for k in range(size):
                            output_K[k] += weights[index] * values_GSK[group, begin + index, k]
            for k in range(size):
                output_THK[token, head, k] = output_K[k] / total


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as machine code; one that was kept, if it is of this source, processor and numba."""
    table, states = int64[:, ::1], float32[:, :, ::1]
    signature = numba.void(float32[:, :, :], states, states, table, table, float32, states)
    options: dict[str, Any] = {"nogil": True, "fastmath": _REORDERED, "error_model": "numpy"}
    try:
        compiled = numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # neither beside the source nor in the user's folder is there a place
        compiled = numba.njit(signature, **options)(function)
    found: Callable[..., None] = compiled
    return found


_attend: Final = _compiled(_attend_in_place)


def can_attend(states: Tensor) -> bool:
    """Whether the kernel is one for such keys and values."""
    return states.device.type == "cpu" and states.dtype == torch.float32


def attend_in_place(  # noqa: PLR0913, PLR0917 - as the kernel
    query_HTK: Tensor,
    keys_GSK: Tensor,
    values_GSK: Tensor,
    rows_R3: NDArray[np.int64],
    extents_E2: NDArray[np.int64],
    scale: float,
    output_THK: Tensor,
) -> None:
    """Write what rows of one token see into their places of the output.

    A row is its place among the iteration's tokens, its first extent and the one behind its last. An extent is the slot
    where it begins and the one behind it.
    """
    states = query_HTK.numpy(), keys_GSK.numpy(), values_GSK.numpy()
    _attend(*states, rows_R3, extents_E2, scale, output_THK.numpy())
