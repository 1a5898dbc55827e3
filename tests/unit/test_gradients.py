from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lemix_stage_worker.gradients import ShardSum

SHARDS = (0, 1, 3, 4)


def _gradients() -> dict[int, list[Tensor]]:
    """Two parameters' gradients of each shard, of sizes whose sum depends on the order of addition."""
    generator = torch.Generator().manual_seed(0)
    return {
        shard: [
            torch.randn(3, 2, generator=generator) * 10.0**shard,
            torch.randn(4, generator=generator) / 10.0**shard,
        ]
        for shard in SHARDS
    }


def _in_order(gradients: dict[int, list[Tensor]]) -> list[Tensor]:
    first, *others = [gradients[shard] for shard in SHARDS]
    total = [gradient.clone() for gradient in first]
    for other in others:
        total = [a + b for a, b in zip(total, other, strict=True)]
    return total


@given(st.permutations(SHARDS))
def test_the_total_does_not_depend_on_arrival(order: list[int]) -> None:
    """Whatever order shards arrive in, they are added in shard order, to the bit."""
    gradients, shards = _gradients(), ShardSum(SHARDS)
    for shard in order:
        assert shards.total is None
        shards.add(shard, gradients[shard])
    assert shards.total is not None
    assert all(torch.equal(a, b) for a, b in zip(shards.total, _in_order(_gradients()), strict=True))


def test_another_order_of_addition_would_give_other_bits() -> None:
    """The values above can tell."""
    gradients = _gradients()
    backwards = [gradients[shard] for shard in reversed(SHARDS)]
    total = backwards[0]
    for other in backwards[1:]:
        total = [a + b for a, b in zip(total, other, strict=True)]
    assert not all(torch.equal(a, b) for a, b in zip(total, _in_order(gradients), strict=True))


@given(st.permutations(SHARDS))
def test_what_is_added_stays_as_it_is(order: list[int]) -> None:
    """A shard's gradients may be on their way to another node of this very process: they aren't written to."""
    gradients, shards = _gradients(), ShardSum(SHARDS)
    for shard in order:
        shards.add(shard, gradients[shard])
    for shard, expected in _gradients().items():
        assert all(torch.equal(a, b) for a, b in zip(gradients[shard], expected, strict=True))


def test_a_shard_that_comes_twice_counts_once() -> None:
    """Delivery is at least once."""
    gradients, shards = _gradients(), ShardSum(SHARDS)
    for shard in (0, 0, 1, 1, 0, 3, 4, 4):
        shards.add(shard, gradients[shard])
    assert shards.total is not None
    assert all(torch.equal(a, b) for a, b in zip(shards.total, _in_order(_gradients()), strict=True))


def test_one_shard_is_its_own_total() -> None:
    """Nothing is added to it."""
    shards = ShardSum((2,))
    shards.add(2, [torch.ones(2)])
    assert shards.total is not None
    assert torch.equal(shards.total[0], torch.ones(2))
