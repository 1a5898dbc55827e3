"""A step's gradients, added in an order that doesn't depend on which node computed what.

A step has a fixed number of virtual shards. Within a shard gradients accumulate in microbatch order on one node; the
shards' sums are added in shard order on every member. Floating-point addition isn't associative, so it is this fixed
order that makes the weights of every cut and membership equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ShardSum:
    """Adds shards' gradients in shard order, as early as that order allows."""

    shards: Sequence[int]
    """Those that have microbatches, rising."""
    _waiting: dict[int, list[Tensor]] = field(default_factory=dict)
    _added: int = 0
    _total: list[Tensor] = field(default_factory=list)

    def add(self, shard: int, gradients: list[Tensor]) -> None:
        """Take a shard's gradients, one a parameter, in model order.

        They aren't written to: on their way to another node of this process they are the same tensors.
        """
        self._waiting[shard] = gradients
        while self._added < len(self.shards) and self.shards[self._added] in self._waiting:
            ready = self._waiting.pop(self.shards[self._added])
            if self._added == 0:
                self._total = ready
            elif self._added == 1:
                self._total = [total + gradient for total, gradient in zip(self._total, ready, strict=True)]
            else:
                for total, gradient in zip(self._total, ready, strict=True):
                    total.add_(gradient)
            self._added += 1

    @property
    def total(self) -> list[Tensor] | None:
        """The sum over all shards, once they are all there."""
        return self._total if self._added == len(self.shards) else None
