"""Child processes that are kept running: what died is started again, later each time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

log = structlog.get_logger()

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
HEALTHY_AFTER_S = 10.0
"""A process that lived this long starts afresh at the first delay."""


@dataclass(frozen=True, slots=True)
class BackOff:
    """How long a process that died waits for its next start."""

    deaths: int = 0
    """In a row, each soon after its start."""

    def after_death(self, *, alive_s: float) -> BackOff:
        """One more, or the first again if it had been healthy."""
        return BackOff(1 if alive_s >= HEALTHY_AFTER_S else self.deaths + 1)

    @property
    def delay_s(self) -> float:
        """0.1, 0.2, 0.4 … 5 seconds."""
        return (
            float(min(FIRST_DELAY_S * 2 ** min(self.deaths - 1, 10), LONGEST_DELAY_S)) if self.deaths else 0.0
        )


@dataclass
class Service:
    """One child and how to start it."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    back_off: BackOff = BackOff()
    started_at: float = 0.0
    due_at: float = 0.0
    last_status: int | None = None
    """With which it died last."""

    def tend(self, now: float) -> bool:
        """Start it if it is due, note its death if it died; whether it was started."""
        if self.process is None:
            if now < self.due_at:
                return False
            self.process, self.started_at = self.start(), now
            return True
        status = self.process.poll()
        if status is not None:
            self.back_off = self.back_off.after_death(alive_s=now - self.started_at)
            self.process, self.last_status, self.due_at = None, status, now + self.back_off.delay_s
            log.warning("process_died", name=self.name, status=status, again_in_s=self.back_off.delay_s)
        return False


def pids(services: Sequence[Service]) -> dict[str, int]:
    """Pid by name, of those that run."""
    return {service.name: service.process.pid for service in services if service.process is not None}
