"""When a cluster can serve, as a function of what `lemix status` shows."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lemix.status import Status, can_serve


def status(**changes: Any) -> Status:
    """One node of two stages that can serve, changed."""
    shown: dict[str, Any] = {
        "leader": "c",
        "nodes": [{"state": "ready", "stages": [{"worker": "a"}, {"worker": "b"}]}],
        "workers": [{"worker": name, "heartbeat_age_s": 0.1} for name in "ab"],
    }
    return cast("Status", shown | changes)


def test_a_led_cluster_of_ready_nodes_can_serve() -> None:
    """All there is to it."""
    assert can_serve(status())


@pytest.mark.parametrize(
    "changes",
    [
        {"leader": None},
        {"nodes": [{"state": "starting", "stages": [{"worker": "a"}, {"worker": "b"}]}]},
        {"nodes": [{"state": "unplaced", "stages": [{"worker": "a"}, {"worker": ""}]}]},
        {"workers": [{"worker": "a", "heartbeat_age_s": 0.1}, {"worker": "b", "heartbeat_age_s": None}]},
        {"workers": []},
    ],
)
def test_it_cannot_with_less(changes: dict[str, Any]) -> None:
    """Nobody leads, a node isn't ready, or a host fell silent: what an earlier life left doesn't count."""
    assert not can_serve(status(**changes))
