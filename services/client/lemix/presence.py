"""Says that a client lives, for the items that are cancelled when it is gone."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace

from lemix_common.broker import Broker
from lemix_common.errors import BrokerUnreachable
from lemix_common.store.items import Items

BEATS_AN_EXPIRY = 4


@dataclass
class Presence:
    """One client's; shown by the thread that listens for it."""

    broker: Broker
    client: str
    expiry_s: float
    """As the cluster's settings said last."""
    _next_at: float = 0.0

    @property
    def every_s(self) -> float:
        """How often it must be shown."""
        return self.expiry_s / BEATS_AN_EXPIRY

    def show(self) -> None:
        """Say so, if it is time; while the broker is away, nobody is taken for gone."""
        if time.monotonic() < self._next_at:
            return
        with suppress(BrokerUnreachable):
            self.expiry_s = Items(replace(self.broker, patience_s=0.0)).still_here(self.client)
            self._next_at = time.monotonic() + self.every_s
