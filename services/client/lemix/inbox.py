"""The thread that hears what happened to this client's items.

News comes on the client's reply stream, in order, and is read on from the last entry seen, also after the broker was
away: nothing is lost or doubled. Only when the stream is silent, or lacks something (it was trimmed, or the item was
submitted by another client), are the items' hashes asked, and then the stream is read to its end first, so that an
item's news is heard once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import structlog

from lemix.presence import Presence
from lemix.replies import Reply, TokensGenerated, end_in_hash, read_replies, read_spans, tokens_of_versions
from lemix.waiting import WaitingItem
from lemix_common.broker import Broker, Entry
from lemix_common.errors import BrokerUnreachable, ClusterError, ItemCancelled, ItemUnknown
from lemix_common.ids import ItemId
from lemix_common.logprobs import TokenLogprob
from lemix_common.store.items import Items

log = structlog.get_logger()

_BLOCK_S = 5.0
_FOREIGN_POLL_S = 0.1
_AUDIT_ITEMS = 500
_CLOSE_S = 10.0


@dataclass(eq=False)
class Inbox:
    """The items of one client that have not ended, and their news."""

    broker: Broker
    stream: str
    presence: Presence
    on_reply: Callable[[Reply], None] | None = None
    audit_every_s: float = 5.0
    _waiting: dict[ItemId, WaitingItem] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _last_id: str = "0-0"
    _next_audit: float = 0.0
    _away_since: float | None = None

    # ---- for the client's threads
    def expect(self, item: WaitingItem) -> WaitingItem:
        """Listen for an item's news from now on; an item already waited for is returned instead."""
        with self._lock:
            known = self._waiting.setdefault(item.future.item_id, item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="lemix-inbox", daemon=True)
                self._thread.start()
            return known

    def forget(self, item: ItemId) -> None:
        """The item was not accepted."""
        with self._lock:
            self._waiting.pop(item, None)

    def find(self, item: ItemId) -> WaitingItem | None:
        """The item, if it is waited for."""
        with self._lock:
            return self._waiting.get(item)

    def wake(self) -> None:
        """Look at the items' hashes now: there is one whose news goes elsewhere."""
        self._next_audit = 0.0
        self._say("look")

    def close(self) -> None:
        """End the thread; the futures of items that have not ended fail, the items go on but for those bound to it."""
        self._closing.set()
        if self._thread is not None:
            self._say("bye")
            self._thread.join(_CLOSE_S)
        for item in self._bound():
            self.forget(item.future.item_id)
            item.fail(ItemCancelled(f"item {item.future.item_id} was cancelled: its client was closed"))
        self._fail_all(
            ClusterError("the client was closed before the item ended; ask again with result(item_id)")
        )

    # ---- the thread
    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                entries = self.broker.read({self.stream: self._last_id}, block_s=self._block_s())
                self._take(entries)
                if self._bound():
                    self.presence.show()
                if not entries or self._next_audit == 0.0:
                    self._audit_when_due()
            except (
                Exception
            ) as error:  # the thread's one broad except: whoever waits is told, the thread goes on
                log.exception("inbox_failed")
                self._fail_all(error)

    def _block_s(self) -> float:
        with self._lock:
            has_foreign = any(item.is_foreign for item in self._waiting.values())
        return _FOREIGN_POLL_S if has_foreign else min(_BLOCK_S, self.audit_every_s, self.presence.every_s)

    def _bound(self) -> list[WaitingItem]:
        with self._lock:
            return [item for item in self._waiting.values() if item.is_bound]

    def _take(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._last_id = entry.id
            if "event" in entry.fields:
                for reply in read_replies(entry.fields):
                    self._apply(reply)

    def _apply(self, reply: Reply, *, is_made_up: bool = False) -> None:
        item = self.find(reply.item)
        if item is not None and isinstance(reply, TokensGenerated) and item.missing_before(reply):
            self._fetch_tokens(item, reply.index)
        if self.on_reply is not None and not (is_made_up and item and item.is_foreign):
            self.on_reply(reply)
        if item is None:
            return
        if isinstance(reply, TokensGenerated):
            item.add_tokens(reply)
        else:
            self.forget(reply.item)
            item.end(reply)

    def _fetch_tokens(self, item: WaitingItem, upto: int | None = None) -> None:
        """Tokens whose replies will not come, from the item's own list."""
        item_id = item.future.item_id
        tokens = tuple(Items(self.broker).tokens(item_id))
        fresh = tokens[len(item.tokens) : upto]
        if fresh:
            spans = read_spans(self.broker.hash(self.broker.keys.item(item_id)))
            texts = Items(self.broker).logprobs(item_id)[len(item.tokens) :]
            logprobs = tuple(map(TokenLogprob.parse, texts[: len(fresh)]))
            for made_up in tokens_of_versions(item_id, len(item.tokens), fresh, spans, logprobs):
                self._apply(made_up, is_made_up=True)

    # ---- the hashes, when the stream is silent
    def _audit_when_due(self) -> None:
        now = self.broker.clock.now()
        with self._lock:
            accepted = [item for item in self._waiting.values() if item.is_accepted][:_AUDIT_ITEMS]
        due = accepted if now >= self._next_audit else [item for item in accepted if item.is_foreign]
        if not due:
            return
        self._next_audit = now + self.audit_every_s
        try:
            self._audit(due, replace(self.broker, patience_s=0.0))
            self._away_since = None
        except BrokerUnreachable as error:
            self._away_since = self._away_since or now
            if now - self._away_since > self.broker.patience_s:
                self._fail_all(error)

    def _audit(self, items: list[WaitingItem], broker: Broker) -> None:
        hashes = broker.hashes(broker.keys.item(item.future.item_id) for item in items)
        self._read_to_the_end(broker)
        for item, fields in zip(items, hashes, strict=True):
            item_id = item.future.item_id
            if self.find(item_id) is not item:
                continue
            if "state" not in fields:
                self.forget(item_id)
                item.fail(ItemUnknown(f"no item {item_id} (or its result has expired)"))
                continue
            ended = end_in_hash(item_id, fields)
            if item.kind == "generate" and (item.is_foreign or ended):
                self._fetch_tokens(item)
            if ended:
                self._apply(ended, is_made_up=True)

    def _read_to_the_end(self, broker: Broker) -> None:
        while True:
            read = partial(broker.client.xrange, self.stream, min=f"({self._last_id}", count=500)
            entries: Any = broker.again(read)
            if not entries:
                return
            self._take(Entry(self.stream, entry_id, dict(fields)) for entry_id, fields in entries)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            items = list(self._waiting.values())
            self._waiting.clear()
        for item in items:
            item.fail(error)

    def _say(self, word: str) -> None:
        """Interrupt the thread's wait; if the broker is away, it isn't waiting."""
        try:
            hasty = replace(self.broker, patience_s=0.0)
            hasty.again(lambda: hasty.client.xadd(self.stream, {"say": word}))
        except BrokerUnreachable:
            log.debug("broker_away")
