"""Asking again what a closed cluster refused.

One whose coordinator is replaced is closed for some seconds: it takes nothing and keeps what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import structlog

from lemix_common.clock import Clock
from lemix_common.errors import ShuttingDown

log = structlog.get_logger()

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
T = TypeVar("T")


def until_open(attempt: Callable[[], T], *, clock: Clock, patience_s: float) -> T:
    """Repeat what a closed cluster refuses, ever less often; its `ShuttingDown` if it is closed for ``patience_s``."""
    delay_s, deadline = FIRST_DELAY_S, clock.now() + patience_s
    while True:
        try:
            return attempt()
        except ShuttingDown as refusal:
            if clock.now() >= deadline:
                raise
            log.warning("cluster_closed", reason=str(refusal), again_in_s=delay_s)
            clock.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
