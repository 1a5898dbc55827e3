"""Time as an argument, so that an hour of retries takes a test no time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lemix_common.errors import WaitTimeout


class Clock(Protocol):
    """What LeMix asks of time."""

    def now(self) -> float:
        """Seconds since the epoch; comparable between the processes of a host."""

    def sleep(self, seconds: float) -> None:
        """Wait that long."""


class SystemClock:
    """The machine's time."""

    def now(self) -> float:
        """Wall-clock seconds."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Really wait."""
        time.sleep(seconds)


@dataclass
class ManualClock:
    """Sleeping moves the clock and nothing else."""

    time: float = 0.0

    def now(self) -> float:
        """The time it was set to."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """Move on by that much."""
        self.time += seconds


def wait_until(
    predicate: Callable[[], bool],
    *,
    what: str,
    timeout_s: float,
    interval_s: float = 0.02,
    stop: threading.Event | None = None,
) -> None:
    """Return when the predicate holds; `WaitTimeout` names what didn't happen. ``stop`` ends the wait early."""
    pause = stop or threading.Event()
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{what}: not within {timeout_s:g} s")
        if pause.wait(interval_s):
            return
