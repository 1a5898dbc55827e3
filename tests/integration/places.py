"""Brokers to test on, each with a way to break it, and a clock for clusters that close and open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fakeredis

from lemix_common.broker import Broker, connect
from lemix_common.clock import SystemClock
from lemix_common.keys import Keys
from lemix_common.server import RunningBroker


@dataclass(frozen=True)
class Outage:
    """Takes the broker away and brings it back with the same data."""

    begin: Callable[[], None]
    end: Callable[[], None]


@dataclass(frozen=True)
class Place:
    """A broker to test on, and the way to break it."""

    broker: Broker
    outage: Outage


def in_memory() -> Place:
    """A broker that is a value of this process."""
    server = fakeredis.FakeServer()
    broker = Broker(fakeredis.FakeRedis(server=server, decode_responses=True), Keys("test"), patience_s=20.0)

    def connected(value: bool) -> Callable[[], None]:
        return lambda: setattr(server, "connected", value)

    return Place(broker, Outage(begin=connected(False), end=connected(True)))


def on_server(server: RunningBroker) -> Place:
    """A connection to a server process."""

    def kill() -> None:
        server.process.kill()
        server.process.wait()

    def restart() -> None:
        server.restart()
        server.wait_ready()

    return Place(connect(server.url, "test", patience_s=20.0), Outage(begin=kill, end=restart))


class Reopening(SystemClock):
    """A clock on which no time passes: who sleeps finds the cluster open again."""

    def __init__(self, reopen: Callable[[], None]) -> None:
        self.reopen = reopen
        self.num_sleeps = 0

    def sleep(self, seconds: float) -> None:
        """Open it."""
        assert seconds > 0
        self.num_sleeps += 1
        self.reopen()
