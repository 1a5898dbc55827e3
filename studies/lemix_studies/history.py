"""What the client saw, event by event: the evidence that a report's counts are computed from."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, TextIO

from lemix.replies import ItemEnded, Reply, TokensGenerated

EventName = Literal["submitted", "accepted", "refused", "token", "done", "failed", "cancelled"]
END_EVENTS = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """A line of history.jsonl."""

    t: float
    client: str
    event: EventName
    item: str
    kind: str
    index: int | None = None
    """A token's position in its generation."""
    weights_version: str | None = None
    result_sha256: str | None = None


@dataclass
class History:
    """Writes each event down as it happens; may be told by several threads."""

    file: TextIO
    now: Callable[[], float]
    client: str = ""
    events: list[HistoryEvent] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    """Of the items whose events are kept; others' replies are passed over."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, event: EventName, item: str) -> None:
        """Something this client did."""
        self._write(event, item, self.now())

    def hear(self, reply: Reply) -> None:
        """Something the cluster said."""
        if reply.item not in self.kinds:
            return
        t = self.now()
        match reply:
            case TokensGenerated(index=first, tokens=tokens, weights_version=version):
                for index in range(first, first + len(tokens)):
                    self._write("token", reply.item, t, index=index, version=version)
            case ItemEnded(state=state, result=result, weights_version=version):
                sha256 = hashlib.sha256(result.encode()).hexdigest() if result else None
                self._write(state, reply.item, t, version=version or None, sha256=sha256)

    def _write(
        self,
        event: EventName,
        item: str,
        t: float,
        *,
        index: int | None = None,
        version: str | None = None,
        sha256: str | None = None,
    ) -> None:
        written = HistoryEvent(
            t=t,
            client=self.client,
            event=event,
            item=item,
            kind=self.kinds[item],
            index=index,
            weights_version=version,
            result_sha256=sha256,
        )
        with self._lock:
            self.events.append(written)
            self.file.write(json.dumps(asdict(written)) + "\n")
            self.file.flush()
