"""Sockets: Unix, TCP, and Unix with shared memory beside it; how they are bound, dialled and tuned."""

from __future__ import annotations

import socket
import stat
import struct
from functools import partial
from pathlib import Path
from typing import Final

from lemix_common.errors import ClusterError, PeerLost, PeerUnreachable, SettingsError
from lemix_common.transports.addresses import (
    Address,
    SharedMemoryAddress,
    TcpAddress,
    UnixAddress,
    parse_address,
)
from lemix_common.transports.base import Identity, Timeouts
from lemix_common.transports.handshake import greet_connector, greet_listener
from lemix_common.transports.listeners import ConnectionListener, Greet, greet
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.shared_memory import SharedMemoryWire
from lemix_common.transports.streams import SocketChannel, StreamWire, Wire

_BACKLOG: Final = 128
_UNIX_BUFFER: Final = 2**20
"""Bytes on their way; 4 MB take 15 % longer with Linux' default."""
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""A silent host is lost after about 11 s."""


class SocketTransport:
    """Channels over Unix sockets, with or without shared memory, and TCP."""

    def __init__(self, identity: Identity, timeouts: Timeouts, pool: BufferPool) -> None:
        self._identity = identity
        self._timeouts = timeouts
        self._pool = pool

    def listen(self, address: str) -> ConnectionListener[socket.socket]:
        """Listen there; a socket file that a dead worker left is replaced."""
        wanted = parse_address(address)
        try:
            listening = _bound(wanted)
        except OSError as error:
            raise ClusterError(f"can't listen at {address}: {error.strerror or error}") from error
        real = _real_address(listening, wanted)
        listener: ConnectionListener[socket.socket] = ConnectionListener(
            listening,
            str(real),
            meet=partial(self._channel, address=real, side=greet_connector),
            forget=partial(_remove_ours, real, _inode(real)),
        )
        listener.start()
        return listener

    def connect(self, address: str) -> SocketChannel:
        """The channel to who listens there."""
        wanted = parse_address(address)
        try:
            connection = _dialled(wanted, self._timeouts.hello_s)
        except OSError as error:
            raise PeerUnreachable(f"nobody answers at {address}: {error.strerror or error}") from error
        return self._channel(connection, address=wanted, side=greet_listener)

    def _channel(self, connection: socket.socket, *, address: Address, side: Greet) -> SocketChannel:
        """The connection as a channel, if both ends can prove themselves in time; else it is closed."""
        try:
            _tune(connection, self._timeouts)
        except OSError as error:
            connection.close()
            raise PeerLost(f"the peer went away before its hello was over ({error})") from error
        peer = greet(self._identity, connection, side, timeout_s=self._timeouts.hello_s)
        return SocketChannel(connection, peer, self._wire(connection, address))

    def _wire(self, connection: socket.socket, address: Address) -> Wire:
        if isinstance(address, SharedMemoryAddress):
            return SharedMemoryWire(connection, self._pool)
        return StreamWire(connection, self._pool)


def _bound(address: Address) -> socket.socket:
    match address:
        case UnixAddress(path) | SharedMemoryAddress(path):
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
    if isinstance(address, UnixAddress | SharedMemoryAddress) and Path(address.path).exists():
        return Path(address.path).stat().st_ino
    return None


def _remove_ours(address: Address, inode: int | None) -> None:
    """Remove a listener's socket file, if it still is this listener's."""
    if isinstance(address, UnixAddress | SharedMemoryAddress) and _inode(address) == inode:
        Path(address.path).unlink()


def _dialled(address: Address, timeout_s: float) -> socket.socket:
    match address:
        case UnixAddress(path) | SharedMemoryAddress(path):
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
