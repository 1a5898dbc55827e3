"""A training backlog without end, for as long as it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from types import TracebackType
from typing import Final, Self

from lemix import Client, TrainItem
from lemix_benchmarks.batches import Batch
from lemix_common.clock import wait_until
from lemix_common.store.training import Training

STEPS_AHEAD: Final = 3
"""That are submitted and not trained: there is always a next one, and at the end there are few to wait for."""
_TIMEOUT_S: Final = 300.0
_LOOK_EVERY_S: Final = 0.05


@dataclass(eq=False)
class Backlog:
    """In a ``with`` block: from the first trained step on, until what was submitted is trained."""

    client: Client
    training: Training
    next_step: Callable[[], Batch]
    """A step's examples."""
    _last: int = 0
    """The last step that was submitted."""
    _stopped: Event = field(default_factory=Event)
    _thread: Thread | None = None

    def __enter__(self) -> Self:
        self._stopped.clear()
        self._last = first = self._committed()
        self._thread = Thread(target=self._feed, name="backlog", daemon=True)
        self._thread.start()
        self._wait_for(first + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if error is None:
            self._wait_for(self._last)

    def _feed(self) -> None:
        while not self._stopped.is_set():
            while self._last < self._committed() + STEPS_AHEAD:
                self.client.train_many(
                    TrainItem(list(example.prompt), list(example.reference)) for example in self.next_step()
                )
                self._last += 1
            self._stopped.wait(_LOOK_EVERY_S)

    def _committed(self) -> int:
        return self.training.state().committed

    def _wait_for(self, step: int) -> None:
        wait_until(
            lambda: self._committed() >= step,
            what=f"step {step} is trained",
            timeout_s=_TIMEOUT_S,
            interval_s=_LOOK_EVERY_S,
        )
