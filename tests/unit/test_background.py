"""The thread for work that the compute loop must not wait for."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from lemix_stage_worker.background import NICENESS, Background
from lemix_stage_worker.inbox import Finished, Inbox


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_the_compute_loop_goes_first() -> None:
    """What is done in the background yields its processor; what follows of it is the calling thread's."""
    background, here = Background(inbox := Inbox()), os.getpriority(os.PRIO_PROCESS, 0)
    found: list[int] = []
    background.do(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), found.append)
    (arrival,) = inbox.drain(wait_s=10.0)
    background.close()
    assert isinstance(arrival, Finished)
    arrival.then()
    assert found == [NICENESS]
    assert os.getpriority(os.PRIO_PROCESS, 0) == here
