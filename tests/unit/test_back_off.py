"""When a process that died is started again."""

from __future__ import annotations

import subprocess
from itertools import accumulate, repeat

from lemix.services import HEALTHY_AFTER_S, BackOff, Service


def test_each_death_doubles_the_wait_up_to_five_seconds() -> None:
    """A process that dies at once is started after 0.1 s, then twice as late each time, at most 5 s."""
    waits = [b.delay_s for b in accumulate(repeat(0.0, 9), _die, initial=BackOff())]
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_a_healthy_life_is_forgiven() -> None:
    """A process that lived for ten seconds starts over at the first wait."""
    tired = BackOff(deaths=8)
    assert tired.after_death(alive_s=HEALTHY_AFTER_S).delay_s == 0.1
    assert tired.after_death(alive_s=HEALTHY_AFTER_S - 0.1).delay_s == 5.0


def test_a_service_comes_back_when_its_wait_is_over() -> None:
    """A dead child is noticed, waited for, and started again; the clock is an argument."""
    service = Service("short", _ended)
    assert service.tend(100.0), "the first start is due at once"
    assert not service.tend(100.5), "its death is noted"
    assert not service.tend(100.55), "not due before 0.1 s have passed"
    assert service.tend(100.6)
    assert not service.tend(200.0), "a long life later"
    assert service.due_at == 200.1


def _die(back_off: BackOff, alive_s: float) -> BackOff:
    return back_off.after_death(alive_s=alive_s)


def _ended() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["true"])
    process.wait()
    return process
