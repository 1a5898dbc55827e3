"""Where items run: pure functions of the nodes that could take them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice

from lemix_common.settings import ClusterSettings


def training_nodes(settings: ClusterSettings) -> tuple[int, ...]:
    """The nodes that train: all, but with `separate` the last ones, as many as its share rounds to (at least one).

    The split and its rounding to even are the paper prototype's (first nodes serve).
    """
    if settings.policy != "separate":
        return tuple(range(settings.nodes))
    training = max(1, round(settings.nodes * settings.training_share))
    return tuple(range(max(1, settings.nodes - training), settings.nodes))


def serving_nodes(settings: ClusterSettings) -> tuple[int, ...]:
    """The nodes that serve: all, but with `separate` those that don't train."""
    if settings.policy != "separate":
        return tuple(range(settings.nodes))
    return tuple(node for node in range(settings.nodes) if node not in training_nodes(settings))


def place_item(settings: ClusterSettings, ready: Sequence[int], sequence: int) -> int | None:
    """The node of the ``sequence``-th dispatched item, or None to let it wait.

    Only ready nodes get items. Where no serving node is ready, a training node that is ready serves: it holds the
    published weights too, and an answer late by training is better than none.
    """
    wanted = set(serving_nodes(settings))
    able = [node for node in ready if node in wanted] or list(ready)
    if not able:
        return None
    if settings.policy == "random":
        return random.Random(f"{settings.seed}:{sequence}").choice(able)
    return able[sequence % len(able)]


def share_step(settings: ClusterSettings, members: Sequence[int], step: int) -> tuple[int, ...]:
    """The member that computes each virtual shard of a step; every shard goes to one node, whoever is a member."""
    shards = settings.virtual_shards
    if settings.policy == "random":
        draw = random.Random(f"{settings.seed}:step:{step}")
        return tuple(draw.choice(members) for _ in range(shards))
    return tuple(sorted(islice(cycle(members), shards)))
