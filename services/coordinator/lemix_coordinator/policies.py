"""Where items run: pure functions of the nodes that could take them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice

from lemix_common.settings import ClusterSettings


def place_item(settings: ClusterSettings, ready: Sequence[int], sequence: int) -> int | None:
    """The node of the ``sequence``-th dispatched item, or None to let it wait.

    Only ready nodes get items. Where no serving node is ready, a training node that is ready serves: it holds the
    published weights too, and an answer late by training is better than none.
    """
    wanted = set(settings.serving_nodes)
    able = [node for node in ready if node in wanted] or list(ready)
    if not able:
        return None
    if settings.policy == "random":
        return random.Random(f"{settings.seed}:{sequence}").choice(able)
    return able[sequence % len(able)]


def share_step(
    settings: ClusterSettings, members: Sequence[int], step: int, *, shards: int
) -> tuple[int, ...]:
    """The member that computes each virtual shard of a step; every shard goes to one node, whoever is a member.

    From step to step another member is the first: where there are fewer shards than members, they compute in turn.
    """
    if settings.policy == "random":
        draw = random.Random(f"{settings.seed}:step:{step}")
        return tuple(draw.choice(members) for _ in range(shards))
    first = (step - 1) % len(members)
    return tuple(sorted(islice(cycle((*members[first:], *members[:first])), shards)))
