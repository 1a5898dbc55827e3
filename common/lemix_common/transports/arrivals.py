"""What happens at a listener's address: channels that wait to be accepted, and refusals to be told."""

from __future__ import annotations

from collections import deque
from threading import Condition
from typing import Generic, TypeVar

from lemix_common.errors import PeerError, PeerLost
from lemix_common.transports.base import Channel

C = TypeVar("C", bound=Channel)


class Arrivals(Generic[C]):
    """A queue that can be closed: then nobody waits any more, and who comes too late is sent away."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._outcomes: deque[C | PeerError] = deque()
        self._is_closed = False
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._outcomes)

    def add(self, outcome: C | PeerError) -> None:
        """Let this be the outcome of an `accept` to come."""
        with self._changed:
            if not self._is_closed:
                self._outcomes.append(outcome)
                self._changed.notify()
                return
        _send_away(outcome)

    def accept(self) -> C:
        """Wait for the next outcome: a channel, or the error that it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._outcomes)
            if self._is_closed:
                raise PeerLost(f"the listener at {self._address} was closed")
            outcome = self._outcomes.popleft()
        if isinstance(outcome, PeerError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Wake who waits, and close the channels that nobody accepted."""
        with self._changed:
            self._is_closed = True
            too_late, self._outcomes = self._outcomes, deque()
            self._changed.notify_all()
        for outcome in too_late:
            _send_away(outcome)


def _send_away(outcome: Channel | PeerError) -> None:
    if not isinstance(outcome, PeerError):
        outcome.close()
