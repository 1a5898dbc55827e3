"""How urgent an item is and for how long it is wanted, checked and as fields of its hash."""

from __future__ import annotations

import math

from lemix.items import Item, TrainItem
from lemix_common.errors import BadInput

PRIORITIES = range(-10, 11)
"""The higher goes first."""


def check_urgency(item: Item) -> None:
    """Refuse what can't be meant."""
    deadline_s = item.deadline_s
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
        raise BadInput(f"deadline_s {deadline_s}: use a number of seconds above 0")
    if isinstance(item, TrainItem):
        return
    if isinstance(item.priority, bool) or item.priority not in PRIORITIES:
        raise BadInput(
            f"priority {item.priority}: use a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}, the higher first"
        )


def urgency_fields(item: Item) -> dict[str, object]:
    """What the cluster needs to know, where it isn't what goes without saying."""
    if isinstance(item, TrainItem):
        return {}
    fields: dict[str, object] = {}
    if item.priority:
        fields["priority"] = int(item.priority)
    if item.while_connected:
        fields["while_connected"] = 1
    return fields
