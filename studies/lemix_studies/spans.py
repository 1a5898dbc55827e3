"""What the stages did, from the cluster's events stream: followed while a replay runs, since the stream is trimmed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lemix_common.broker import Broker, Entry

Span = Mapping[str, Any]
"""One piece of a stage's time: node, stage, worker, cat, item, start, end, version, blocked_s, busy."""
_BLOCK_S = 0.2


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
        """Take what has been said and end."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            while entries := self._read(block_s=0.001):
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


def blocked_by_item(spans: Iterable[Span]) -> dict[str, float]:
    """How long each item's ready steps waited behind training, over all stages."""
    blocked: dict[str, float] = {}
    for span in spans:
        if span.get("item") and span.get("blocked_s"):
            blocked[span["item"]] = blocked.get(span["item"], 0.0) + float(span["blocked_s"])
    return blocked


def stage_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """The sum of each item's stage times."""
    seconds: dict[str, float] = {}
    for span in spans:
        if span.get("item"):
            seconds[span["item"]] = seconds.get(span["item"], 0.0) + span["end"] - span["start"]
    return seconds


def chrome_trace(spans: Iterable[Span]) -> dict[str, object]:
    """The spans as Chrome and Perfetto show them: a process a node, a thread a stage."""
    ordered = sorted(spans, key=lambda span: float(span["start"]))
    zero = float(ordered[0]["start"]) if ordered else 0.0
    events = [
        {
            "ph": "X",
            "pid": span["node"],
            "tid": span["stage"],
            "cat": span["cat"],
            "name": span["cat"],
            "ts": 1e6 * (span["start"] - zero),
            "dur": 1e6 * (span["end"] - span["start"]),
            "args": {"item": span.get("item"), "weights_version": span.get("version")},
        }
        for span in ordered
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
