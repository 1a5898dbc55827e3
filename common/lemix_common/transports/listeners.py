"""Taking connections and saying hello, over whatever gives connections; `streams` carries the frames that follow."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Event, Lock, Thread
from typing import Final, Generic, Protocol, TypeVar

from lemix_common.errors import PeerError, PeerLost, PeerRefused
from lemix_common.ids import WorkerId
from lemix_common.transports.arrivals import Arrivals
from lemix_common.transports.base import Identity
from lemix_common.transports.handshake import GREETINGS, Greeting, Hear, Say
from lemix_common.transports.streams import Connection, SocketChannel, send_all
from lemix_common.wire import PRELUDE_BYTES

_STRANGERS: Final = 64
"""Connections a listener holds that haven't been accepted yet; more are dropped unheard."""
_AFTER_FAILURE_S: Final = 0.05
"""Between two tries to take a connection that the system can't give (no file descriptors left)."""

Greet = Callable[[Identity, Say, Hear], WorkerId]


class TimedConnection(Connection, Protocol):
    """A connection that can be asked not to wait for ever."""

    def settimeout(self, seconds: float | None, /) -> None:
        """How long to wait for bytes; None is for ever."""

    def recv(self, num_bytes: int, /) -> bytes:
        """Wait for bytes, up to so many; none at the end."""


C = TypeVar("C", bound=TimedConnection)
C_co = TypeVar("C_co", bound=TimedConnection, covariant=True)


class Listening(Protocol[C_co]):
    """What gives connections, with a listening socket's calls and errors."""

    def accept(self) -> tuple[C_co, object]:
        """Wait for the next connection."""

    def shutdown(self, how: int, /) -> None:
        """Wake who waits."""

    def close(self) -> None:
        """Free it."""


def greet(identity: Identity, connection: TimedConnection, side: Greet, *, timeout_s: float) -> WorkerId:
    """Who is at the other end, if both ends can prove themselves in time; else the connection is closed."""
    deadline = time.monotonic() + timeout_s
    try:
        peer = side(identity, partial(_say, connection), partial(_hear, connection, deadline))
        connection.settimeout(None)
    except (OSError, EOFError) as error:
        connection.close()
        raise PeerLost(f"the peer went away before its hello was over ({error})") from error
    except PeerError:
        connection.close()
        raise
    return peer


class ConnectionListener(Generic[C]):
    """A thread that takes connections, and a short-lived thread for each hello."""

    def __init__(
        self,
        listening: Listening[C],
        address: str,
        *,
        meet: Callable[[C], SocketChannel],
        forget: Callable[[], None],
    ) -> None:
        self._listening = listening
        self._address = address
        self._meet = meet
        self._forget = forget
        self._arrivals: Arrivals[SocketChannel] = Arrivals(address)
        self._strangers: dict[C, Thread] = {}
        self._lock = Lock()
        self._closed = Event()
        self._thread = Thread(target=self._take_connections, name=f"accept {address}", daemon=True)

    @property
    def address(self) -> str:
        """Where it really listens."""
        return self._address

    def start(self) -> None:
        """Begin to take connections."""
        self._thread.start()

    def accept(self) -> SocketChannel:
        """Wait for the next peer."""
        return self._arrivals.accept()

    def close(self) -> None:
        """Stop listening, drop who wasn't accepted, and wait for the threads."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._thread.join()
        with self._lock:
            strangers = dict(self._strangers)
            for stranger in strangers:
                with suppress(OSError):
                    stranger.shutdown(socket.SHUT_RDWR)
        for thread in strangers.values():
            thread.join()
        self._arrivals.close()
        self._listening.close()
        self._forget()

    def _take_connections(self) -> None:
        while not self._closed.is_set():
            try:
                stranger, _ = self._listening.accept()
            except OSError:
                self._closed.wait(_AFTER_FAILURE_S)
                continue
            if len(self._strangers) + len(self._arrivals) >= _STRANGERS:
                stranger.close()
                continue
            thread = Thread(target=self._greet, args=(stranger,), name=f"hello {self._address}", daemon=True)
            with self._lock:
                self._strangers[stranger] = thread
            thread.start()

    def _greet(self, stranger: C) -> None:
        outcome: SocketChannel | PeerError
        try:
            outcome = self._meet(stranger)
        except PeerLost as error:
            outcome = PeerRefused(str(error))
        except PeerError as error:
            outcome = error
        with self._lock:  # at once: what can be accepted is no stranger, `close` leaves it alone
            del self._strangers[stranger]
            self._arrivals.add(outcome)


def _say(connection: TimedConnection, greeting: Greeting) -> None:
    send_all(connection, GREETINGS.encode(greeting))


def _hear(connection: TimedConnection, deadline: float) -> Greeting:
    prelude = GREETINGS.read_prelude(_exactly(connection, PRELUDE_BYTES, deadline))
    return GREETINGS.read_header(prelude, _exactly(connection, prelude.header_bytes, deadline)).message


def _exactly(connection: TimedConnection, num_bytes: int, deadline: float) -> bytes:
    """So many bytes and not one more, before the deadline, however slowly they trickle in."""
    received = b""
    while len(received) < num_bytes:
        connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        piece = connection.recv(num_bytes - len(received))
        if not piece:
            raise EOFError("the connection ended")
        received += piece
    return received
