"""Work that the compute loop must not wait for: files, loading, and calls whose answer it needs.

Packing a version or writing its files takes a processor for a while. Where threads have priorities (Linux) the compute
loop goes first, so that tokens wait less for a version that is published beside them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from lemix_common.errors import ClusterError, LemixError
from lemix_stage_worker.inbox import Finished, Inbox

log = structlog.get_logger()
T = TypeVar("T")

NICENESS: Final = 10
"""A tenth of the compute loop's share, where both want the same processor."""


def ignore(_answer: object) -> None:
    """What follows work whose answer nobody needs."""


@dataclass
class Background:
    """One thread that does one thing after another; what follows each happens in the compute loop."""

    inbox: Inbox
    failure: Exception | None = None
    """What went wrong that nobody had an answer to; the worker ends with it."""
    _executor: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="background", initializer=_give_way
        )
    )

    def do(
        self,
        work: Callable[[], T],
        then: Callable[[T], None] = ignore,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Do ``work`` when its turn comes; ``failed`` gets an error of ours, of a file or of a missing field."""

        def finished(future: Future[T]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self.inbox.post(Finished(lambda: then(future.result())))
            elif isinstance(error, (LemixError, OSError, KeyError)) and failed is not None:
                self.inbox.post(Finished(lambda: failed(error)))
            else:
                self.inbox.post(Finished(lambda: self._give_up(error)))

        try:
            self._executor.submit(work).add_done_callback(finished)
        except RuntimeError as error:  # the worker is closing
            log.debug("not_done_any_more", reason=str(error))

    def close(self) -> None:
        """Drop what hasn't begun, and wait for what has."""
        self._executor.shutdown(cancel_futures=True)

    def _give_up(self, error: BaseException) -> None:
        log.error("background_failed", reason=f"{type(error).__name__}: {error}")
        self.failure = error if isinstance(error, Exception) else ClusterError(str(error))


def _give_way() -> None:
    """The calling thread goes behind the process's others."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
