"""Unix sockets and TCP: finding each other and shaking hands; `streams` carries the frames."""

from __future__ import annotations

import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Final

from lemix_common.errors import ClusterError, PeerError, PeerLost, PeerRefused, SettingsError
from lemix_common.ids import WorkerId
from lemix_common.transports.addresses import Address, TcpAddress, UnixAddress, parse_address
from lemix_common.transports.arrivals import Arrivals
from lemix_common.transports.base import Identity, Timeouts
from lemix_common.transports.handshake import GREETINGS, Greeting, Hear, Say, greet_connector, greet_listener
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.streams import SocketChannel, send_all
from lemix_common.wire import PRELUDE_BYTES

_BACKLOG: Final = 128
_STRANGERS: Final = 64
"""Connections a listener holds that haven't been accepted yet; more are dropped unheard."""
_AFTER_FAILURE_S: Final = 0.05
"""Between two tries to take a connection that the system can't give (no file descriptors left)."""
_UNIX_BUFFER: Final = 2**20
"""Bytes on their way; 4 MB take 15 % longer with Linux' default."""
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""A silent host is lost after about 11 s."""

Greet = Callable[[Identity, Say, Hear], WorkerId]


class SocketTransport:
    """Channels over Unix sockets and TCP."""

    def __init__(self, identity: Identity, timeouts: Timeouts, pool: BufferPool) -> None:
        self._identity = identity
        self._timeouts = timeouts
        self._pool = pool

    def listen(self, address: str) -> SocketListener:
        """Listen there; a socket file that a dead worker left is replaced."""
        wanted = parse_address(address)
        try:
            listening = _bound(wanted)
        except OSError as error:
            raise ClusterError(f"can't listen at {address}: {error.strerror or error}") from error
        listener = SocketListener(listening, wanted, greet=partial(self._channel, greet=greet_connector))
        listener.start()
        return listener

    def connect(self, address: str) -> SocketChannel:
        """The channel to who listens there."""
        try:
            connection = _dialled(parse_address(address), self._timeouts.hello_s)
        except OSError as error:
            raise PeerLost(f"nobody answers at {address}: {error.strerror or error}") from error
        return self._channel(connection, greet_listener)

    def _channel(self, connection: socket.socket, greet: Greet) -> SocketChannel:
        """The connection as a channel, if both ends can prove themselves in time; else it is closed."""
        deadline = time.monotonic() + self._timeouts.hello_s
        try:
            _tune(connection, self._timeouts)
            peer = greet(self._identity, partial(_say, connection), partial(_hear, connection, deadline))
            connection.settimeout(None)
        except (OSError, EOFError) as error:
            connection.close()
            raise PeerLost(f"the peer went away before its hello was over ({error})") from error
        except PeerError:
            connection.close()
            raise
        return SocketChannel(connection, peer, self._pool)


class SocketListener:
    """A listening socket, a thread that takes connections, and a short-lived thread for each hello."""

    def __init__(
        self, listening: socket.socket, wanted: Address, *, greet: Callable[[socket.socket], SocketChannel]
    ) -> None:
        self._listening = listening
        self._address = _real_address(listening, wanted)
        self._inode = _inode(self._address)
        self._greet = greet
        self._arrivals: Arrivals[SocketChannel] = Arrivals(str(self._address))
        self._strangers: dict[socket.socket, Thread] = {}
        self._lock = Lock()
        self._closed = Event()
        self._thread = Thread(target=self._take_connections, name=f"accept {self._address}", daemon=True)

    @property
    def address(self) -> str:
        """Where it really listens."""
        return str(self._address)

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
        if isinstance(self._address, UnixAddress) and _inode(self._address) == self._inode:
            Path(self._address.path).unlink()

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
            thread = Thread(target=self._meet, args=(stranger,), name=f"hello {self._address}", daemon=True)
            with self._lock:
                self._strangers[stranger] = thread
            thread.start()

    def _meet(self, stranger: socket.socket) -> None:
        outcome: SocketChannel | PeerError
        try:
            outcome = self._greet(stranger)
        except PeerLost as error:
            outcome = PeerRefused(str(error))
        except PeerError as error:
            outcome = error
        with self._lock:  # at once: what can be accepted is no stranger, `close` leaves it alone
            del self._strangers[stranger]
            self._arrivals.add(outcome)


def _bound(address: Address) -> socket.socket:
    match address:
        case UnixAddress(path):
            _remove_stale(path)
            return _listening(socket.AF_UNIX, path)
        case TcpAddress(host, port):
            family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return _listening(family, target)
        case _:
            raise SettingsError(f"{address} is no socket's address")


def _listening(family: int, target: str | tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            listening.bind(target)
            Path(str(target)).chmod(stat.S_IRUSR | stat.S_IWUSR)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(target)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens at; `bind` refuses whatever else is there."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()


def _real_address(listening: socket.socket, wanted: Address) -> Address:
    if isinstance(wanted, TcpAddress):
        return TcpAddress(wanted.host, listening.getsockname()[1])
    return wanted


def _inode(address: Address) -> int | None:
    """Which file the address is, if it is one: a socket file that somebody replaced isn't ours to remove."""
    if isinstance(address, UnixAddress) and Path(address.path).exists():
        return Path(address.path).stat().st_ino
    return None


def _dialled(address: Address, timeout_s: float) -> socket.socket:
    match address:
        case UnixAddress(path):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            try:
                connection.connect(path)
            except OSError:
                connection.close()
                raise
            return connection
        case TcpAddress(host, port):
            return socket.create_connection((host, port), timeout_s)
        case _:
            raise SettingsError(f"{address} is no socket's address")


def _tune(connection: socket.socket, timeouts: Timeouts) -> None:
    """Half the send time-out for each wait: a send that took some bytes, then none, has waited twice."""
    microseconds = max(1, int(timeouts.send_s / 2 * 1e6))
    limit = struct.pack("ll", *divmod(microseconds, 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
    else:  # the kernel sizes TCP's buffers itself
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # macOS has some of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _say(connection: socket.socket, greeting: Greeting) -> None:
    send_all(connection, GREETINGS.encode(greeting))


def _hear(connection: socket.socket, deadline: float) -> Greeting:
    prelude = GREETINGS.read_prelude(_exactly(connection, PRELUDE_BYTES, deadline))
    return GREETINGS.read_header(prelude, _exactly(connection, prelude.header_bytes, deadline)).message


def _exactly(connection: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """So many bytes and not one more, before the deadline, however slowly they trickle in."""
    received = b""
    while len(received) < num_bytes:
        connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        piece = connection.recv(num_bytes - len(received))
        if not piece:
            raise EOFError("the connection ended")
        received += piece
    return received
