"""What the stages did, from the cluster's events stream: followed while a replay runs, since the stream is trimmed."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lemix_common.broker import Broker, Entry

Span = Mapping[str, Any]
"""One piece of a stage's time: node, stage, worker, cat, item, start, end, version, blocked_s, busy."""
_BLOCK_S = 0.2
_LAST_S = 0.4
"""Workers tell of what ran every quarter of a second; who says nothing for so long has told everything."""
_PAGE_ENTRIES = 200


@dataclass
class SpanTail:
    """Follows the events stream in a thread."""

    broker: Broker
    spans: list[Span] = field(default_factory=list)
    _last_id: str = ""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Take what is said from now on."""
        self._last_id = self.broker.last_id(self.broker.keys.events)
        self._thread = threading.Thread(target=self._follow, name="lemix-spans")
        self._thread.start()

    def stop(self) -> None:
        """Take what is left to be said of what ran, and end."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            while entries := self._read(block_s=_LAST_S):
                self._take(entries)

    def _follow(self) -> None:
        while not self._stopped.is_set():
            self._take(self._read(block_s=_BLOCK_S))

    def _read(self, *, block_s: float) -> list[Entry]:
        return self.broker.read({self.broker.keys.events: self._last_id}, block_s=block_s)

    def _take(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._last_id = entry.id
            self.spans += json.loads(entry.fields["spans"])


def recent_spans(broker: Broker, last_s: float | None) -> list[Span]:
    """What the stream still has of the last so many seconds of work (None: all of it), in its order."""
    batches: list[list[Span]] = []
    before, oldest, newest = "+", math.inf, -math.inf
    while last_s is None or newest - oldest < last_s:
        entries = _page_before(broker, before)
        if not entries:
            break
        for entry_id, fields in entries:
            batches.append(json.loads(fields.get("spans", "[]")))
            oldest = min([oldest, *(span["start"] for span in batches[-1])])
            newest = max([newest, *(span["end"] for span in batches[-1])])
            before = f"({entry_id}"
    return [span for batch in reversed(batches) for span in batch]


def _page_before(broker: Broker, before: str) -> list[tuple[str, dict[str, str]]]:
    """The newest entries older than an id, the newest first."""
    entries: Any = broker.again(
        lambda: broker.client.xrevrange(broker.keys.events, max=before, count=_PAGE_ENTRIES)
    )
    return list(entries)


def blocked_by_item(spans: Iterable[Span]) -> dict[str, float]:
    """How long each item's ready steps waited behind training, over all stages."""
    blocked: dict[str, float] = {}
    for span in spans:
        for item, waited_s in span.get("waits", {}).items():
            blocked[item] = blocked.get(item, 0.0) + float(waited_s)
    return blocked


def stage_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """The sum of each item's stage times, of those spans that were its alone."""
    seconds: dict[str, float] = {}
    for span in spans:
        if span.get("item") and not span.get("others"):
            seconds[span["item"]] = seconds.get(span["item"], 0.0) + span["end"] - span["start"]
    return seconds
