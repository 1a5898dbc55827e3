"""The broker as LeMix uses it: Lua calls that may be repeated, stream reads that survive a restart of the server.

redis-py's own retries are off: a retried XADD may duplicate and a retried XREADGROUP strands entries. Every change of
state is one Lua call that is idempotent by its key, so `Broker.call` repeats it until the broker is back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004 - redis-py's name
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's name
)
from redis.retry import Retry

from lemix_common.clock import Clock, SystemClock
from lemix_common.errors import BrokerUnreachable, BrokerUnsuitable
from lemix_common.keys import Keys, lua_names

log = structlog.get_logger()

OLDEST_SERVER = (7, 0)
_READ_TIMEOUT_S = 15.0
_LONGEST_BLOCK_S = 5.0
_AWAY = (ConnectionError, TimeoutError, BusyLoadingError)
T = TypeVar("T")

NOTICE = """
local function notice(kind, ...)
  redis.call('XADD', K.control, 'MAXLEN', '~', 100000, '*', 'type', kind, ...)
end
"""
"""Lua: put a notice on the control stream. Part of the calls that change what other processes must know."""

LEADER_ONLY = """
if redis.call('GET', K.leader_epoch) ~= ARGV[1] then return {'fenced'} end
"""
"""Lua: only the leader of the epoch in ARGV[1] may go on."""


@dataclass(frozen=True, slots=True)
class Lua:
    """One atomic change of state; key names are written as ``K.name`` (see `keys.lua_names`)."""

    name: str
    body: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream."""

    stream: str
    id: str
    fields: dict[str, str]


def open_client(url: str) -> redis.Redis:
    """A redis-py client with time-outs above our block times and no retries of its own."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=_READ_TIMEOUT_S,
        socket_connect_timeout=5.0,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


@dataclass
class Broker:
    """Calls to one cluster's broker; may be shared by threads (each call takes a connection of the pool)."""

    client: redis.Redis
    keys: Keys = field(default_factory=Keys)
    clock: Clock = field(default_factory=SystemClock)
    patience_s: float = 60.0
    outages: int = 0
    """Times the broker was found away; whoever trusts heartbeats waits a while after each."""
    _scripts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def call(self, lua: Lua, *args: object) -> Any:
        """Run a Lua call, again if the broker went away meanwhile; `BrokerUnreachable` after ``patience_s``."""
        return self.again(lambda: self._evaluate(lua, args))

    def call_many(self, calls: Sequence[tuple[Lua, tuple[object, ...]]]) -> list[Any]:
        """Run many calls in one round trip, in order. Each is atomic, the whole isn't.

        The first of each kind brings its script: a server that doesn't know it (it was restarted) would refuse that
        call, run the later ones, and so let a completion overtake the tokens before it.
        """
        if not calls:
            return []

        def evaluate_all() -> list[Any]:
            brought: set[str] = set()
            with self.client.pipeline(transaction=False) as pipe:
                for lua, args in calls:
                    source, sha = self._script(lua)
                    run, script = (pipe.evalsha, sha) if lua.name in brought else (pipe.eval, source)
                    run(script, 1, self.keys.cluster_state, *map(_text, args))
                    brought.add(lua.name)
                return list(pipe.execute())

        return self.again(evaluate_all)

    def again(self, attempt: Callable[[], T]) -> T:
        """Repeat an idempotent call while the broker is away."""
        delay_s, deadline = 0.05, self.clock.now() + self.patience_s
        while True:
            try:
                return attempt()
            except _AWAY as error:
                self.outages += 1
                if self.clock.now() > deadline:
                    raise BrokerUnreachable(
                        f"the broker has been away for {self.patience_s:g} s ({error}); is it running?"
                    ) from error
                self.clock.sleep(delay_s)
                delay_s = min(2 * delay_s, 1.0)

    def read(self, after: Mapping[str, str], *, block_s: float, count: int = 200) -> list[Entry]:
        """Entries after the given ids, waiting up to ``block_s`` for the first; none while the broker is away."""
        streams = cast("Any", dict(after))
        return self._read(lambda: self.client.xread(streams, count=count, block=_milliseconds(block_s)))

    def read_group(
        self, stream: str, group: str, consumer: str, *, block_s: float, count: int, after: str = ">"
    ) -> list[Entry]:
        """New entries for this consumer, or its pending ones after an id; none while the broker is away.

        With ``block_s`` 0 it takes what is there.
        """
        block = _milliseconds(block_s) if after == ">" and block_s else None
        return self._read(
            lambda: self.client.xreadgroup(group, consumer, {stream: after}, count=count, block=block)
        )

    def ensure_group(self, stream: str, group: str) -> None:
        """Create a consumer group that reads the stream from its beginning, unless it exists."""

        def create() -> None:
            try:
                self.client.xgroup_create(stream, group, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

        self.again(create)

    def last_id(self, stream: str) -> str:
        """Id of a stream's last entry (``0-0`` if it has none), to read on from."""
        newest: Any = self.again(lambda: self.client.xrevrange(stream, count=1))
        return str(newest[0][0]) if newest else "0-0"

    def hash(self, key: str) -> dict[str, str]:
        """All fields of a hash; empty if there is none."""
        value: Any = self.again(lambda: self.client.hgetall(key))
        return dict(value)

    def hashes(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Many hashes as they are at one moment, in one round trip."""
        wanted = list(keys)

        def get() -> list[dict[str, str]]:
            with self.client.pipeline(transaction=True) as pipe:
                for key in wanted:
                    pipe.hgetall(key)
                return [dict(value) for value in pipe.execute()]

        return self.again(get)

    def _read(self, read: Callable[[], Any]) -> list[Entry]:
        try:
            replies = read() or []
        except _AWAY as error:
            self.outages += 1
            log.warning("broker_away", reason=str(error))
            self.clock.sleep(0.2)
            return []
        streams = replies.items() if isinstance(replies, dict) else replies
        return [
            Entry(stream, entry_id, dict(values))
            for stream, entries in streams
            for entry_id, values in _flat(entries)
            if values is not None
        ]

    def _evaluate(self, lua: Lua, args: tuple[object, ...]) -> Any:
        source, sha = self._script(lua)
        texts = [_text(arg) for arg in args]
        try:
            return self.client.evalsha(sha, 1, self.keys.cluster_state, *texts)
        except NoScriptError:
            return self.client.eval(source, 1, self.keys.cluster_state, *texts)

    def _script(self, lua: Lua) -> tuple[str, str]:
        known = self._scripts.get(lua.name)
        if known is None:
            source = f"{lua_names(self.keys, lua.body)}\n{lua.body}"
            known = self._scripts[lua.name] = (source, hashlib.sha1(source.encode()).hexdigest())  # noqa: S324 - EVALSHA's
        return known


def _flat(entries: Any) -> list[Any]:
    """redis-py gives a stream's entries as a list, and under RESP3 as a list of one list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _milliseconds(seconds: float) -> int:
    return max(1, int(1000 * min(seconds, _LONGEST_BLOCK_S)))


def _text(arg: object) -> str:
    return (
        arg if isinstance(arg, str) else json.dumps(arg) if isinstance(arg, (dict, list, tuple)) else str(arg)
    )


def check_broker(client: redis.Redis, url: str) -> None:
    """Refuse a broker that is unreachable, too old or can't keep what it accepts, in one sentence."""
    try:
        info: Any = client.info("server")
        client.set("{lemix-check}", "1", px=1000)
    except AuthenticationError as error:
        raise BrokerUnsuitable(f"{url}: the broker wants another user or password ({error})") from None
    except ReadOnlyError:
        raise BrokerUnsuitable(f"{url}: the broker is a read-only replica; give the primary's URL") from None
    except (*_AWAY, OSError) as error:
        raise BrokerUnreachable(f"{url}: no Redis or Valkey answers there ({error})") from None
    version = str(info.get("valkey_version") or info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        raise BrokerUnsuitable(f"{url}: the broker is version {version}; LeMix needs Redis >= 7.0 or Valkey")


def connect(url: str, cluster: str = "lemix", *, patience_s: float = 60.0) -> Broker:
    """A checked connection to a broker."""
    if url.startswith(("redis://", "rediss://", "unix://")):
        client = open_client(url)
        check_broker(client, hide_password(url))
        return Broker(client, Keys(cluster), patience_s=patience_s)
    raise BrokerUnreachable(f"{url!r} is not a broker's URL (expected redis://…, rediss://… or unix://…)")


def hide_password(url: str) -> str:
    """The URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    host = rest.rpartition("@")[2]
    return f"{scheme}{separator}{host}"
