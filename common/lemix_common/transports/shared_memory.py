"""Frames whose large payloads lie in shared memory: only their beginning goes over the Unix socket between the ends.

A record, as long as a frame's prelude, stands before a frame whose payload is in a slot (see `slots`)::

    LENT    the next frame's payload will be in slot N
    NEW     the same, and slot N is the memory whose descriptor comes with this record
    GONE    slot N isn't used any more

Record and header go first and the payload is copied after them, so that the receiver wakes up and reads them meanwhile;
one byte, `_FULL`, says when it is there. For 4 MB that saves a fifth of the time.

Frames that are small, or find no free slot, go over the socket whole. So a receiver that keeps all its buffers makes
its peer slower and never stops it, and two neighbours that send to each other wait for nothing but the socket.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from lemix_common.errors import BadFrame
from lemix_common.transports.base import Delivery
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.slots import Borrower, Lender, Slot
from lemix_common.transports.streams import Reader, read_frame, send_all, without
from lemix_common.wire import FRAMES, PRELUDE_BYTES

INLINE_BYTES: Final = 2**17
"""A payload up to this size is sooner through the socket: slots begin to pay between 128 and 256 KB."""
_MAGIC: Final = b"Slot"
_RECORD: Final = struct.Struct("<4sHHIQ")
_VERSION: Final = 1
_LENT, _NEW, _GONE = range(3)
_KINDS: Final = (_LENT, _NEW, _GONE)
_FULL: Final = b"F"
_DESCRIPTOR_BYTES: Final = array("i").itemsize


class _Record(NamedTuple):
    kind: int
    number: int
    room: int = 0

    def to_bytes(self) -> bytes:
        return _RECORD.pack(_MAGIC, _VERSION, *self)


def _try_record(beginning: memoryview) -> _Record | None:
    """The record that begins here, if it isn't a frame."""
    if beginning[0] != _MAGIC[0]:  # frames begin otherwise, and nearly all are frames
        return None
    magic, version, *values = _RECORD.unpack(beginning)
    record = _Record(*values)
    if magic != _MAGIC or version != _VERSION or record.kind not in _KINDS:
        raise BadFrame(f"a record of version {version} and kind {record.kind}; it began {bytes(beginning)!r}")
    return record


class SharedMemoryWire:
    """Frames over a Unix socket and slots."""

    def __init__(self, connection: socket.socket, pool: BufferPool) -> None:
        self._connection = connection
        self._pool = pool
        self._lender = Lender()
        self._borrower = Borrower()
        self._reader = _DescriptorReader(connection)

    def write(self, pieces: list[memoryview]) -> None:
        """Copy the payload into a free slot and send only the rest, or send all of it."""
        num_bytes = sum(map(len, pieces)) - len(pieces[0])
        slot = self._lender.try_slot(num_bytes) if num_bytes > INLINE_BYTES else None
        if slot is None:
            send_all(self._connection, pieces)
            return
        head, *payload = pieces
        is_new = slot.descriptor is not None
        records = [_Record(_GONE, number) for number in self._lender.retired]
        self._lender.retired.clear()
        records.append(_Record(_NEW if is_new else _LENT, slot.number, slot.room))
        beginning = b"".join(record.to_bytes() for record in records)
        self._announce([memoryview(beginning), head], slot)
        slot.lend(payload)
        send_all(self._connection, [memoryview(_FULL)])

    def read(self) -> Delivery:
        """Wait for the next frame; a payload in a slot is viewed there, another one is read into a pooled buffer."""
        number: int | None = None
        while (record := _try_record(beginning := self._reader.read(PRELUDE_BYTES))) is not None:
            number = self._follow(record)
        if number is None:
            return read_frame(beginning, self._reader, self._pool)
        prelude = FRAMES.read_prelude(beginning)
        header = FRAMES.read_header(prelude, self._reader.read(prelude.header_bytes))
        payload, release = self._borrower.borrow(number, prelude.payload_bytes)
        if bytes(self._reader.read(1)) != _FULL:
            raise BadFrame(f"slot {number} was lent and never filled")
        return Delivery(header.message, header.tensors(payload), release)

    def close(self) -> None:
        """Unmap the slots; what somebody still views stays until they are done."""
        self._lender.close()
        self._borrower.close()
        self._reader.close()

    def _announce(self, pieces: Sequence[memoryview], slot: Slot) -> None:
        """Send this, and with it the memory of a new slot."""
        if slot.descriptor is None:
            send_all(self._connection, pieces)
            return
        descriptors = array("i", [slot.descriptor])
        sent = self._connection.sendmsg(pieces, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        slot.close_descriptor()
        send_all(self._connection, without(pieces, sent))

    def _follow(self, record: _Record) -> int | None:
        """Do what the record says; the slot of the next frame."""
        if record.kind == _GONE:
            self._borrower.forget(record.number)
            return None
        if record.kind == _NEW:
            descriptor = self._reader.take_descriptor()
            try:
                self._borrower.take_up(record.number, record.room, descriptor)
            finally:
                os.close(descriptor)
        return record.number


class _DescriptorReader(Reader):
    """Keeps the descriptors that come with the bytes; each begins with a record, so all are read ahead."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._socket = connection
        self._descriptors: list[int] = []

    def receive_ahead(self, ahead: memoryview) -> int:
        """Wait for whatever comes; 0 at the end."""
        num_bytes, ancillary, _, _ = self._socket.recvmsg_into(
            [ahead], socket.CMSG_SPACE(_DESCRIPTOR_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array("i", content))
        if len(self._descriptors) > 1:  # the kernel gives those of one message at a time
            raise BadFrame("memory that belongs to no slot")
        return num_bytes

    def take_descriptor(self) -> int:
        """The one that came with the record just read."""
        if not self._descriptors:
            raise BadFrame("a new slot without its memory (are this process's file descriptors used up?)")
        return self._descriptors.pop()

    def close(self) -> None:
        """Close what nobody asked for."""
        while self._descriptors:
            os.close(self._descriptors.pop())
