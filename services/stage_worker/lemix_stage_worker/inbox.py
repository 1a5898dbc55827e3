"""What reaches the compute loop, from whichever thread: one queue, so that one thread owns all state."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lemix_common.messages import Frame, Notice
from lemix_common.store.items import StartedItem


@dataclass(frozen=True, slots=True, eq=False)
class FrameArrived:
    """A frame from a neighbour (or from another stage of this worker)."""

    frame: Frame
    tensors: tuple[Tensor, ...]
    release: Callable[[], None]
    peer: str
    at: float


@dataclass(frozen=True, slots=True)
class NoticeRead:
    """The next notice of the control stream."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class ItemsStarted:
    """Items that a node's stage 0 pulled."""

    node: int
    epoch: int
    items: tuple[StartedItem, ...]


@dataclass(frozen=True, slots=True)
class ItemStale:
    """The broker says that another attempt at the item is current, or that it has ended."""

    node: int
    item: str
    attempt: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection to a peer ended."""

    peer: str


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """Work done in the background; ``then`` goes on with it in the compute loop."""

    then: Callable[[], None]


Arrival = FrameArrived | NoticeRead | ItemsStarted | ItemStale | PeerGone | Finished


@dataclass
class Inbox:
    """A queue that many threads fill and the compute loop empties."""

    _queue: queue.SimpleQueue[Arrival] = field(default_factory=queue.SimpleQueue)

    def post(self, arrival: Arrival) -> None:
        """Leave something for the compute loop."""
        self._queue.put(arrival)

    def drain(self, *, wait_s: float) -> Iterator[Arrival]:
        """Everything there is; waits for the first if there is nothing."""
        try:
            yield self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return
