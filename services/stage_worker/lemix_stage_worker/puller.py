"""Pulls a node's items for its stage 0, and starts as many as may run at a time, in the order of their turns.

Whatever the node was given waits in a line here, as entries of a few words each (never more than the cluster's
``max_queue``), so that an urgent item needn't wait behind others in the stream. The line is filled up whenever there
is room, right before the first in it are started. Until then nothing has happened to an item: no version is pinned for
it, and no delivery is counted if the node is lost; one that was taken back meanwhile is found out at its start.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import structlog

from lemix_common.broker import Entry
from lemix_common.errors import BrokerUnreachable
from lemix_common.store.items import STAGE_0, Items
from lemix_stage_worker.admission import turn
from lemix_stage_worker.inbox import Inbox, ItemsStarted

log = structlog.get_logger()

PAGE = 500
"""Entries of one read."""


@dataclass
class Puller:
    """One thread for one placement epoch of a node; its consumer name tells both, so its leases are its own."""

    items: Items
    inbox: Inbox
    worker: str
    node: int
    epoch: int
    max_running: int
    _held: set[str] = field(default_factory=set)
    """Entries of the items in work."""
    _line: list[tuple[float, int, Entry]] = field(default_factory=list)
    """A heap of those that wait: by their turns, then as they came."""
    _in_line: set[str] = field(default_factory=set)
    _arrivals: count[int] = field(default_factory=count)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin pulling."""
        self._thread = threading.Thread(target=self._run, name=f"pull-{self.node}", daemon=True)
        self._thread.start()

    def ended(self, entry: str) -> None:
        """An item left the node: there is room for another."""
        with self._changed:
            self._held.discard(entry)
            self._changed.notify()

    def stop(self) -> None:
        """Pull no more; what was pulled is the compute loop's to drop."""
        with self._changed:
            self._stopped.set()
            self._changed.notify()

    def _run(self) -> None:
        broker = self.items.broker
        outages = broker.outages
        while room := self._wait_for_room():
            try:
                # a reply that was lost with the broker strands its entries: they are read again
                stranded, outages = broker.outages != outages, broker.outages
                self._line_up_pending() if stranded else self._line_up_new()
                self._take([self._next() for _ in range(min(room, len(self._line)))])
            except BrokerUnreachable as error:
                log.error("pull_failed", node=self.node, reason=str(error))

    def _wait_for_room(self) -> int:
        """How many items may come; 0 when told to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or len(self._held) < self.max_running)
            return 0 if self._stopped.is_set() else self.max_running - len(self._held)

    # ---- the line
    def _line_up_new(self) -> None:
        """Everything that the node was given since; waits for something only where nobody is in line."""
        entries = self._read(">", block_s=0.0 if self._line else 1.0)
        self._line_up(entries)
        while len(entries) == PAGE:
            entries = self._read(">", block_s=0.0)
            self._line_up(entries)

    def _line_up_pending(self) -> None:
        """What this consumer was given before, and never got."""
        after = "0"
        while entries := self._read(after, block_s=0.0):
            self._line_up([e for e in entries if e.id not in self._held and e.id not in self._in_line])
            after = entries[-1].id

    def _line_up(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            heapq.heappush(self._line, (turn(entry.fields), next(self._arrivals), entry))
            self._in_line.add(entry.id)

    def _next(self) -> Entry:
        *_, entry = heapq.heappop(self._line)
        self._in_line.discard(entry.id)
        return entry

    def _read(self, after: str, *, block_s: float) -> list[Entry]:
        stream, consumer = self.items.broker.keys.work(self.node), f"{self.worker}:{self.epoch}"
        return self.items.broker.read_group(
            stream, STAGE_0, consumer, block_s=block_s, count=PAGE, after=after
        )

    # ---- into work
    def _take(self, entries: list[Entry]) -> None:
        if not entries:
            return
        with self._changed:
            self._held |= {entry.id for entry in entries}
        try:
            started, stale = self.items.start(self.node, self.worker, entries)
        except BrokerUnreachable:
            for entry in entries:
                self.ended(entry.id)  # they are read again with what is stranded
            raise
        for entry in stale:
            self.ended(entry.id)
        self.items.broker.call_many([self.items.close_entry(self.node, entry.id) for entry in stale])
        if started:
            self.inbox.post(ItemsStarted(self.node, self.epoch, tuple(started)))
