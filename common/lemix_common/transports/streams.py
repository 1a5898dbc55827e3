"""Frames over a connected stream of bytes: the sender's own memory in, pooled memory out.

Sending is one `sendmsg` of the frame's pieces. Receiving reads a little ahead, so that a small frame costs
one system call; the rest of a large payload goes from the kernel straight into its pooled buffer. Everything
blocks in the kernel, without Python's lock.

A connection ends in one way: `shutdown`, which wakes whoever is blocked in it, from any thread. Its file
descriptor is closed only when nobody is inside any more, so that a number the kernel gave to another socket
is never read.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import Final, Protocol

from lemix_common.errors import BadFrame, PeerLost
from lemix_common.ids import WorkerId
from lemix_common.messages import Frame
from lemix_common.transports.base import Delivery
from lemix_common.transports.pool import BufferPool
from lemix_common.wire import FRAMES, PRELUDE_BYTES, TensorBuffer

READ_AHEAD: Final = 2**14
_PIECES: Final = 1_024
"""Of one `sendmsg`; Linux takes no more."""


class Connection(Protocol):
    """What carries bytes both ways, with a socket's calls and errors; both directions may be used at once."""

    def sendmsg(self, pieces: Sequence[memoryview], /) -> int:
        """Send some of the pieces' bytes; `BlockingIOError` if none was taken within a time-out."""

    def recv_into(self, view: memoryview, num_bytes: int, flags: int, /) -> int:
        """Wait for bytes, up to so many (all of them with `MSG_WAITALL`); 0 at the end."""

    def shutdown(self, how: int, /) -> None:
        """End both directions and wake who waits."""

    def close(self) -> None:
        """Free it, when nobody is inside any more."""


class Wire(Protocol):
    """How frames go over a connection; the channel sees to it that one thread writes and one reads at a time."""

    def write(self, pieces: list[memoryview]) -> None:
        """Send the frame that these pieces are."""

    def read(self) -> Delivery:
        """Wait for the next frame; `EOFError` at the end."""

    def close(self) -> None:
        """Let go of what the connection had."""


class SocketChannel:
    """A channel over a connected and authenticated connection that has a time-out for sending."""

    def __init__(self, connection: Connection, peer: WorkerId, wire: Wire) -> None:
        self._connection = connection
        self._peer = peer
        self._wire = wire
        self._sending = Lock()
        self._receiving = Lock()
        self._end: str | None = None

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._peer

    def send(self, frame: Frame, tensors: Sequence[TensorBuffer] = ()) -> None:
        """Send a frame; a failure ends the connection, since nobody knows where a next frame would begin."""
        pieces = FRAMES.encode(frame, tensors)
        with self._sending:
            self._check_open()
            try:
                self._wire.write(pieces)
            except BlockingIOError as error:
                raise self._lost(f"{self._peer} takes nothing any more") from error
            except OSError as error:
                raise self._lost(f"{self._peer} ended the connection ({error.strerror or error})") from error

    def receive(self) -> Delivery:
        """Wait for the next frame."""
        with self._receiving:
            self._check_open()
            try:
                return self._wire.read()
            except EOFError as error:
                raise self._lost(f"{self._peer} ended the connection") from error
            except OSError as error:
                raise self._lost(f"{self._peer} ended the connection ({error.strerror or error})") from error
            except BadFrame:
                self._lost(f"{self._peer} sent a bad frame")
                raise

    def close(self) -> None:
        """End the connection, wait until nobody is inside, and close it."""
        self._lost(f"the channel to {self._peer} was closed")
        with self._sending, self._receiving:
            self._wire.close()
            self._connection.close()

    def _check_open(self) -> None:
        if self._end is not None:
            raise PeerLost(self._end)

    def _lost(self, reason: str) -> PeerLost:
        """Mark the channel as ended, for the first reason it had, and wake whoever is blocked in it."""
        if self._end is None:
            self._end = reason
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        return PeerLost(self._end)


class StreamWire:
    """Whole frames, one after another."""

    def __init__(self, connection: Connection, pool: BufferPool) -> None:
        self._connection = connection
        self._pool = pool
        self._reader = Reader(connection)

    def write(self, pieces: list[memoryview]) -> None:
        """Send the frame from the tensors' own memory."""
        send_all(self._connection, pieces)

    def read(self) -> Delivery:
        """Wait for the next frame; its payload goes into a pooled buffer."""
        return read_frame(self._reader.read(PRELUDE_BYTES), self._reader, self._pool)

    def close(self) -> None:
        """Nothing is kept."""


def send_all(connection: Connection, pieces: Sequence[memoryview]) -> None:
    """Send all the pieces in order; `BlockingIOError` if a time-out passes in which none of it was taken."""
    while pieces:
        pieces = without(pieces, connection.sendmsg(pieces[:_PIECES]))


def without(pieces: Sequence[memoryview], sent: int) -> Sequence[memoryview]:
    """What is left of the pieces after so many bytes."""
    for index, piece in enumerate(pieces):
        if sent < piece.nbytes:
            return [piece[sent:], *pieces[index + 1 :]]
        sent -= piece.nbytes
    return ()


def read_frame(beginning: memoryview, reader: Reader, pool: BufferPool) -> Delivery:
    """The frame that begins with this prelude, its payload read into a pooled buffer."""
    prelude = FRAMES.read_prelude(beginning)
    header = FRAMES.read_header(prelude, reader.read(prelude.header_bytes))
    payload, release = pool.take(prelude.payload_bytes)
    reader.read_into(payload)
    return Delivery(header.message, header.tensors(payload), release)


class Reader:
    """Exact reads from a connection, `EOFError` at its end; what was read ahead is taken first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ahead = memoryview(bytearray(READ_AHEAD))
        self._start = self._end = 0

    def read(self, num_bytes: int) -> memoryview:
        """Few bytes, good until the next read."""
        if num_bytes and self._start == self._end:
            self._read_ahead()
        end = self._start + num_bytes
        if end <= self._end:
            view = self._ahead[self._start : end]
            self._start = end
            return view
        view = memoryview(bytearray(num_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill the view."""
        end = self._start + len(view)
        if end <= self._end:
            view[:] = self._ahead[self._start : end]
            self._start = end
            return
        while view:
            if self._start < self._end:
                num_bytes = min(len(view), self._end - self._start)
                view[:num_bytes] = self._ahead[self._start : self._start + num_bytes]
                self._start += num_bytes
            elif len(view) >= READ_AHEAD:
                num_bytes = self._connection.recv_into(view, len(view), socket.MSG_WAITALL)
                if num_bytes == 0:
                    raise EOFError
            else:
                num_bytes = 0
                self._read_ahead()
            view = view[num_bytes:]

    def _read_ahead(self) -> None:
        num_bytes = self.receive_ahead(self._ahead)
        if num_bytes == 0:
            raise EOFError
        self._start, self._end = 0, num_bytes

    def receive_ahead(self, ahead: memoryview) -> int:
        """Wait for whatever comes; 0 at the end."""
        return self._connection.recv_into(ahead, len(ahead), 0)
