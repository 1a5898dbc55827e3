"""What a worker tells the broker: on a thread of its own, in order, many calls a round trip.

The compute loop never waits for the broker. Calls are idempotent and repeated while the broker is away; an answer
that says an item has gone elsewhere comes back through the inbox.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import structlog

from lemix_common.broker import Broker, Lua
from lemix_common.errors import BrokerUnreachable
from lemix_common.store.items import TAX, Call
from lemix_stage_worker.metrics import StageTimes

log = structlog.get_logger()

SPANS_EVERY_S = 0.25
SPANS_AT_MOST = 500
_LEFT_OUT_IF_EMPTY = ("others", "more", "tokens", "contexts", "waits")

_SPANS = Lua(
    "report_spans",
    TAX
    + """
redis.call('XADD', K.events, 'MAXLEN', '~', 50000, '*', 'spans', ARGV[1])
for item, blocked_s in pairs(cjson.decode(ARGV[2])) do
  local state = redis.call('HGET', K.item(item), 'state')
  if state then redis.call('HINCRBYFLOAT', K.item(item), 'blocked_s', blocked_s) end
  if state == 'done' then add_to_tax(blocked_s, '0') end
end
redis.call('HSET', K.worker(ARGV[3]), 'busy', ARGV[4])
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What ran on a stage, from when to when, with which weights."""

    node: int
    stage: int
    worker: str
    cat: str
    item: str
    """The first of those it was done for."""
    version: str
    start: float
    end: float
    blocked_s: float
    """How long it waited, ready, behind training: the longest of its items' waits."""
    others: tuple[str, ...] = ()
    """The next ones."""
    more: int = 0
    """How many items more it was done for."""
    tokens: int = 0
    """Of an iteration, or of a training microbatch whose pass was not interrupted."""
    contexts: int = 0
    """Σ(length · context) of their sequences: with the tokens, what a profile predicts by."""
    waits: Mapping[str, float] = field(default_factory=dict)
    """How long each of its items waited so, of those that did."""


@dataclass
class Reporter:
    """A queue of calls and the thread that makes them."""

    worker: str
    broker: Broker
    times: StageTimes = field(default_factory=StageTimes)
    _calls: queue.SimpleQueue[tuple[Call, Callable[[Any], None] | None] | None] = field(
        default_factory=queue.SimpleQueue
    )
    _spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _flushed_at: float = 0.0
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin reporting."""
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def call(self, call: Call, then: Callable[[Any], None] | None = None) -> None:
        """Have a call made; ``then`` gets its answer, on the reporter's thread."""
        self._calls.put((call, then))

    def span(self, span: Span) -> None:
        """Note what ran."""
        with self._lock:
            self._spans.append(span)
        self.times.add(
            span.node, span.stage, span.cat, busy_s=span.end - span.start, blocked_s=span.blocked_s
        )

    def close(self) -> None:
        """Make what is left, then end."""
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch, is_open = self._next_batch()
            try:
                answers = self.broker.call_many([call for call, _ in batch])
                for (_, then), answer in zip(batch, answers, strict=True):
                    if then is not None:
                        then(answer)
                self._flush_spans(at_once=not is_open)
            except BrokerUnreachable as error:
                log.error("reports_lost", reason=str(error), calls=len(batch))

    def _next_batch(self) -> tuple[list[tuple[Call, Callable[[Any], None] | None]], bool]:
        batch: list[tuple[Call, Callable[[Any], None] | None]] = []
        try:
            entry = self._calls.get(timeout=SPANS_EVERY_S)
            while entry is not None:
                batch.append(entry)
                entry = self._calls.get_nowait()
        except queue.Empty:
            return batch, True
        return batch, False

    def _flush_spans(self, *, at_once: bool) -> None:
        now = self.broker.clock.now()
        if not self._spans or (now - self._flushed_at < SPANS_EVERY_S and not at_once):
            return
        with self._lock:
            spans, self._spans = self._spans, []
        busy = _busy_shares(spans, now - (self._flushed_at or min(span.start for span in spans)))
        self._flushed_at = now
        for first in range(0, len(spans), SPANS_AT_MOST):
            part = spans[first : first + SPANS_AT_MOST]
            text = json.dumps([_readable(span) for span in part], separators=(",", ":"))
            self.broker.call(_SPANS, text, _blocked_by_item(part), self.worker, busy)


def _readable(span: Span) -> dict[str, object]:
    fields = asdict(span)
    shown = fields | {name: round(fields[name], 6) for name in ("start", "end", "blocked_s")}
    shown["waits"] = {item: round(waited_s, 6) for item, waited_s in span.waits.items()}
    return {name: value for name, value in shown.items() if value or name not in _LEFT_OUT_IF_EMPTY}


def _blocked_by_item(spans: list[Span]) -> dict[str, str]:
    """Seconds that each item's steps waited behind training, of those that did."""
    blocked: dict[str, float] = {}
    for span in spans:
        for item, waited_s in span.waits.items():
            blocked[item] = blocked.get(item, 0.0) + waited_s
    return {item: f"{seconds:.6f}" for item, seconds in blocked.items()}


def _busy_shares(spans: list[Span], window_s: float) -> dict[str, dict[str, float]]:
    """By stage (``NODE:STAGE``) the share of the window each kind of work took."""
    shares: dict[str, dict[str, float]] = {}
    for span in spans:
        kinds = shares.setdefault(f"{span.node}:{span.stage}", {})
        kinds[span.cat] = round(kinds.get(span.cat, 0.0) + (span.end - span.start) / max(window_s, 1e-9), 4)
    return shares
