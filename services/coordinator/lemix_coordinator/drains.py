"""For how long requests of two versions divided what they would have shared.

A forward pass is of one version. While a version drains, its requests and those of the served one take turns; where
there are more of them than iterations on their way, each waits for passes it could have been part of. That time is what
publishing costs those served, and `max_drain_share` bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Drains:
    """Of the last drain, from one look at the cluster to the next."""

    divided_s: float = 0.0
    """In which requests of two versions took turns."""
    undivided_s: float = 0.0
    """Since it began, all other time."""
    _draining: str = ""
    _looked_at: float | None = None

    def look(self, in_flight: Mapping[str, str], draining: str, now: float, *, num_stages: int) -> None:
        """Take in how many requests run on each version, and which of them drains ('': none).

        Requests beyond ``num_stages``, those of all nodes, would have shared a forward pass.
        """
        if draining and draining != self._draining:
            self.divided_s = self.undivided_s = 0.0
        elapsed_s = now - self._looked_at if self._looked_at is not None else 0.0
        running = {version: int(count) for version, count in in_flight.items() if int(count) > 0}
        if draining in running and len(running) > 1 and sum(running.values()) > num_stages:
            self.divided_s += elapsed_s
        else:
            self.undivided_s += elapsed_s
        self._draining, self._looked_at = draining, now
