"""What is known of many nodes side by side, so that a prediction is some array operations a stage, no loop.

S stages, N nodes, G gaps: what is left of a stage's time between the backwards that are still to come there, the first
gap before all of them, the last one behind. A forward goes into the first gap that it fits in. Nothing here is written
to: a changed node gets a copy with its column replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lemix_coordinator.scheduling.node_state import Backward, NodeState

Floats = NDArray[np.float64]

KEPT_BACKWARDS: Final = 4
"""Of a stage; later ones count as one with the last of these, from its begin to their end."""
NUM_GAPS: Final = KEPT_BACKWARDS + 1
BEGIN, END, BUSY = range(3)
"""Of a gap: from, to, and the seconds of backwards before it."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A column a node."""

    free_SN: Floats
    gaps_S3GN: Floats
    """Gaps that a node doesn't have begin and end at ∞."""
    num_S: tuple[int, ...]
    """The most gaps that any node has had on the stage at once: what needs looking at."""

    def replaced(self, node: int, state: NodeState, *, had_backwards: bool) -> Columns:
        """With another state of this node."""
        free_SN = self.free_SN.copy()
        free_SN[:, node] = state.free_S
        if not had_backwards and not any(state.backwards_S):
            return Columns(free_SN, self.gaps_S3GN, self.num_S)
        gaps_S3GN = self.gaps_S3GN.copy()
        gaps_S3GN[..., node] = [_gaps(backwards) for backwards in state.backwards_S]
        num_S = tuple(
            [
                max(most, min(len(backwards) + 1, NUM_GAPS))
                for most, backwards in zip(self.num_S, state.backwards_S, strict=True)
            ]
        )
        return Columns(free_SN, gaps_S3GN, num_S)


def columns_of(nodes: Sequence[NodeState]) -> Columns:
    """The columns of these nodes."""
    num_stages = len(nodes[0].free_S)
    gaps_3G = np.array(_gaps(()))
    columns = Columns(
        np.array([node.free_S for node in nodes]).T.copy(),
        np.tile(gaps_3G[:, :, None], (num_stages, 1, 1, len(nodes))),
        (1,) * num_stages,
    )
    for number, node in enumerate(nodes):
        if any(node.backwards_S):
            columns = columns.replaced(number, node, had_backwards=True)
    return columns


def without_backwards(columns: Columns) -> Columns:
    """As a work sees them that overtakes backwards."""
    return Columns(columns.free_SN, columns.gaps_S3GN, (1,) * len(columns.num_S))


def first_fit(
    columns: Columns, stage: int, ready_N: Floats, seconds: float, *, with_idle: bool
) -> tuple[Floats, Floats]:
    """Of each node: when a forward of so many seconds begins on the stage, and the idle time before it."""
    free_N = columns.free_SN[stage]
    begin_N: Floats = np.maximum(ready_N, free_N)
    num_gaps = columns.num_S[stage]
    busy_N: Floats | float = 0.0
    if num_gaps > 1:
        gaps_3GN = columns.gaps_S3GN[stage]
        begin_GN = np.maximum(gaps_3GN[BEGIN, :num_gaps], begin_N)
        fits_GN = begin_GN + seconds <= gaps_3GN[END, :num_gaps]
        begin_N = np.where(fits_GN, begin_GN, np.inf).min(axis=0)
        if with_idle:
            busy_N = np.take_along_axis(gaps_3GN[BUSY], fits_GN.argmax(axis=0)[None], axis=0)[0]
    return begin_N, np.maximum(begin_N - free_N - busy_N, 0.0) if with_idle else begin_N


def _gaps(backwards: Sequence[Backward]) -> list[list[float]]:
    """Begins, ends, busy seconds before."""
    begins, ends, busy = [-np.inf], [], [0.0]
    last = len(backwards) - 1
    for place, backward in enumerate(backwards[:KEPT_BACKWARDS]):
        end = backwards[last].end if place == KEPT_BACKWARDS - 1 else backward.end
        ends.append(backward.begin)
        begins.append(end)
        busy.append(busy[-1] + end - backward.begin)
    missing = NUM_GAPS - len(begins)
    return [begins + [np.inf] * missing, [*ends, np.inf] + [np.inf] * missing, busy + [0.0] * missing]
