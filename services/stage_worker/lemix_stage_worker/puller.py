"""Pulls a node's items for its stage 0, as many as may run at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from lemix_common.broker import Entry
from lemix_common.errors import BrokerUnreachable
from lemix_common.store.items import STAGE_0, Items
from lemix_stage_worker.inbox import Inbox, ItemsStarted

log = structlog.get_logger()


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
                entries = self._read(self.max_running, after="0") if stranded else self._read(room, after=">")
                self._take([entry for entry in entries if entry.id not in self._held])
            except BrokerUnreachable as error:
                log.error("pull_failed", node=self.node, reason=str(error))

    def _wait_for_room(self) -> int:
        """How many items may come; 0 when told to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or len(self._held) < self.max_running)
            return 0 if self._stopped.is_set() else self.max_running - len(self._held)

    def _read(self, count: int, *, after: str) -> list[Entry]:
        stream, consumer = self.items.broker.keys.work(self.node), f"{self.worker}:{self.epoch}"
        return self.items.broker.read_group(stream, STAGE_0, consumer, block_s=1.0, count=count, after=after)

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
