"""Where to cut a model's layers into stages: contiguous, non-empty, the most expensive stage as cheap as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from lemix_common.errors import ModelError

Combine = Callable[[float, float], float]


def cut_layers(
    layer_costs: Sequence[float], stages: int, *, first_extra: float = 0, last_extra: float = 0
) -> tuple[range, ...]:
    """Cut the layers into `stages` ranges so that the most expensive stage is as cheap as possible.

    `first_extra` and `last_extra` are what the embedding and the head add to the first and last stage, in the
    layers' unit. Among equally good cuts the most even one (smallest sum of squares) is taken, then the one that
    cuts earliest. More stages than layers, or fewer than one, is a `ModelError`.
    """
    if not 1 <= stages <= len(layer_costs):
        raise ModelError(
            f"{len(layer_costs)} layers can't be cut into {stages} stages: choose 1 to {len(layer_costs)} stages"
        )
    until = [0.0, *accumulate(layer_costs)]

    def stage_cost(stage: int, start: int, stop: int) -> float:
        extra = first_extra * (stage == 0) + last_extra * (stage == stages - 1)
        return until[stop] - until[start] + extra

    def all_costs(borders: Sequence[int]) -> list[float]:
        return [stage_cost(stage, *layers) for stage, layers in enumerate(pairwise(borders))]

    def square(stage: int, start: int, stop: int) -> float:
        cost = stage_cost(stage, start, stop)
        return cost * cost if cost <= bottleneck else float("inf")

    bottleneck = max(all_costs(_best_borders(len(layer_costs), stages, stage_cost, max)))
    borders = _best_borders(len(layer_costs), stages, square, lambda left, right: left + right)
    return tuple(range(start, stop) for start, stop in pairwise(borders))


def _best_borders(
    layers: int, stages: int, stage_cost: Callable[[int, int, int], float], combine: Combine
) -> tuple[int, ...]:
    """The `stages + 1` borders whose combined stage costs are least, earliest cuts first (dynamic programming)."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        best = {
            stop: min(
                (combine(cost, stage_cost(stage, start, stop)), (*borders, stop))
                for start, (cost, borders) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, layers - (stages - 1 - stage) + 1)
        }
    return best[layers][1]
