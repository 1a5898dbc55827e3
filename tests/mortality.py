"""Killing parts of a cluster that share this process, as SIGKILL would: at a chosen call, or now.

A part has a broker connection of its own. When it dies, its connections are cut and whatever it still tries to say is
lost; its threads end where they next touch the broker.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import redis

from lemix_common.broker import Broker, Entry, Lua

T = TypeVar("T")


class Killed(BaseException):
    """Ends a thread without a word (see `silent_deaths`)."""


@contextmanager
def silent_deaths() -> Iterator[None]:
    """Threads that end by `Killed` are no unhandled exceptions."""
    hook = threading.excepthook

    def quiet(death: threading.ExceptHookArgs) -> None:
        if not issubclass(death.exc_type, Killed):
            hook(death)

    threading.excepthook = quiet
    yield
    threading.excepthook = hook


@dataclass(frozen=True, slots=True)
class KillPoint:
    """Die at the n-th call of a named Lua: before it reached the broker, or after it did (its answer is lost)."""

    lua: str
    when: Literal["before", "after"]
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.when}-{self.lua}-{self.nth}"


@dataclass(frozen=True, slots=True)
class FramePoint:
    """Die at the n-th frame of a kind: about to send it, having sent it, or when it has arrived."""

    frame: str
    when: Literal["unsent", "sent", "arrived"]
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.when}-{self.frame}-{self.nth}"


@dataclass
class MortalBroker(Broker):
    """A broker's connection that can die with its process."""

    kill_point: KillPoint | FramePoint | None = None
    dead: threading.Event = field(default_factory=threading.Event)
    on_death: Callable[[], None] = lambda: None
    _calls: Counter[str] = field(default_factory=Counter)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def die(self) -> None:
        """Cut the connections; nothing gets through any more, in either direction."""
        self.dead.set()
        self.client.connection_pool.disconnect()
        self.on_death()

    def call(self, lua: Lua, *args: object) -> Any:
        """Run a Lua call, unless it is the last moment."""
        return self.call_many([(lua, args)])[0]

    def call_many(self, calls: Sequence[tuple[Lua, tuple[object, ...]]]) -> list[Any]:
        """Run many; a broker may have done the first ones when its client is killed."""
        for index, (lua, _) in enumerate(calls):
            if when := self._moment(lua):
                if done := calls[: index + (when == "after")]:
                    super().call_many(done)
                self.die()
                raise Killed
        return super().call_many(calls)

    def at_frame(self, frame: str, when: str) -> None:
        """A moment of its process that isn't the broker's; it may be the last one."""
        point = self.kill_point
        if isinstance(point, FramePoint) and (point.frame, point.when) == (frame, when):
            self._calls[frame] += 1
            if self._calls[frame] == point.nth:
                self.die()
                raise Killed

    def again(self, attempt: Callable[[], T]) -> T:
        """Repeat while the broker is away, not after death."""
        return super().again(lambda: self._alive(attempt))

    def _read(self, read: Callable[[], Any]) -> list[Entry]:
        return super()._read(lambda: self._alive(read))

    def _alive(self, attempt: Callable[[], T]) -> T:
        self._check()
        try:
            answer = attempt()
        except Exception:  # a connection that is cut under a thread may raise anything
            self._check()
            raise
        self._check()
        return answer

    def _check(self) -> None:
        if self.dead.is_set():
            raise Killed

    def _moment(self, lua: Lua) -> str | None:
        point = self.kill_point
        if not isinstance(point, KillPoint) or lua.name != point.lua:
            return None
        with self._counting:
            self._calls[lua.name] += 1
            return point.when if self._calls[lua.name] == point.nth else None


def mortal(broker: Broker, kill_point: KillPoint | FramePoint | None = None) -> MortalBroker:
    """A connection of its own to the same broker and cluster."""
    pool = broker.client.connection_pool
    own = type(pool)(connection_class=pool.connection_class, **pool.connection_kwargs)
    return MortalBroker(
        redis.Redis(connection_pool=own), broker.keys, broker.clock, broker.patience_s, kill_point=kill_point
    )
