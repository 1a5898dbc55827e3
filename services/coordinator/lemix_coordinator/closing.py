"""How a coordinator ends that nobody supervises: the leader closes the cluster first, as `lemix up` does otherwise.

It goes on leading meanwhile, since the last checkpoint needs a leader. A second request to stop ends it at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import structlog

from lemix_common.broker import Broker
from lemix_common.errors import BrokerError
from lemix_common.store.closing import last_checkpoint

log = structlog.get_logger()


@dataclass
class StopRequests:
    """How often we were asked to stop."""

    asked: threading.Event = field(default_factory=threading.Event)
    asked_again: threading.Event = field(default_factory=threading.Event)

    def note(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        (self.asked_again if self.asked.is_set() else self.asked).set()


def close_when_asked(name: str, requests: StopRequests, broker: Broker, data_dir: Path) -> threading.Event:
    """Close the cluster in the background when asked to stop, if coordinator ``name`` leads; set when that is over.

    ``broker`` has a patience of 0: one that is away is asked again, but not beyond the time that there is.
    """
    is_over = threading.Event()

    def close() -> None:
        requests.asked.wait()
        try:
            if broker.client.get(broker.keys.leader) == name:
                last_checkpoint(broker, data_dir / "checkpoints", lambda: not requests.asked_again.is_set())
        except BrokerError as error:
            log.warning("no_last_checkpoint", reason=str(error))
        finally:
            is_over.set()

    threading.Thread(target=close, name="close", daemon=True).start()
    return is_over
