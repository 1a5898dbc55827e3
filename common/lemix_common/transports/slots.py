"""Memory that two processes share under no name: what one lends, the other reads where it lies.

A slot is an anonymous file (`memfd_create`) that both ends map: a page whose first byte says whether the slot is lent,
then room for one payload. Its descriptor travels once, over their Unix socket; from then on its number is enough::

    lender (it sends)                              borrower (it receives)
      finds a slot whose byte is FREE
        ─────────────── number ───────────────▶
      byte := LENT, copies the payload
        ─────────────── it is full ───────────▶
                                                     views of the slot itself
                                                     byte := FREE when they are released, or all gone

Giving a slot back is one byte in memory: no message, no wake-up, from any thread, and the lender needs nobody who reads
for it. A lender without a free slot is told so at once and never waits; what is lent for good costs one slot.

The files have no name, so whatever ends whichever process leaves nothing behind, and /dev/shm, which is tiny in many
containers, isn't used. Pages are reserved and touched when a slot is made: memory that the system can't give is an
error of one call then, not a signal in the middle of a copy. Files are sealed: the other end can't shrink them.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog

from lemix_common.errors import BadFrame
from lemix_common.transports.pool import Lease

log = structlog.get_logger()

NUM_SLOTS: Final = 16
"""Of one direction of a channel, at most; each costs both ends a file descriptor before Python 3.13."""
SLOT_BYTES: Final = 2**28
"""Of one direction of a channel, together at most."""
_SMALLEST: Final = 2**18
_STATE_BYTES: Final = mmap.PAGESIZE
_FREE, _LENT = 0, 1
_COPY_BYTES: Final = 2**23
"""Copied at a time: other threads get their turn in between."""


class Slot:
    """A slot of ours."""

    def __init__(self, number: int, room: int) -> None:
        self.number = number
        self.room = room
        self.descriptor: int | None = _make_file(_STATE_BYTES + room)
        """To be sent to the borrower, then closed."""
        try:
            self._memory = _map(self.descriptor, _STATE_BYTES + room)
        except OSError:
            self.close_descriptor()
            raise

    @property
    def is_free(self) -> bool:
        """Whether the borrower has given it back."""
        return self._memory[0] == _FREE

    def lend(self, pieces: Sequence[memoryview]) -> None:
        """Copy the pieces into it, one behind another."""
        self._memory[0] = _LENT
        start = _STATE_BYTES
        with memoryview(self._memory) as memory:
            for piece in pieces:
                for begin in range(0, len(piece), _COPY_BYTES):
                    part = piece[begin : begin + _COPY_BYTES]
                    memory[start : start + len(part)] = part
                    start += len(part)

    def close_descriptor(self) -> None:
        """The borrower has it, or nobody ever will."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Lender:
    """The slots of one direction of a channel, from the end that sends: made when needed, used again when free."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Slot]] = {}
        """By their room; the rooms asked for least recently come first."""
        self._num_made = 0
        self._can_grow = True
        self.retired: list[int] = []
        """Numbers that the borrower can forget; whoever tells it empties the list."""

    def try_slot(self, num_bytes: int) -> Slot | None:
        """A free slot that holds so much; None if all are lent and no more may be made."""
        room = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        slots = self._slots[room] = self._slots.pop(room, [])
        for slot in slots:
            if slot.is_free:
                return slot
        return self._try_new(room)

    def close(self) -> None:
        """Unmap everything."""
        for slot in self._all():
            slot.close_descriptor()
        self._slots.clear()
        self._can_grow = False

    def _all(self) -> list[Slot]:
        return [slot for slots in self._slots.values() for slot in slots]

    def _try_new(self, room: int) -> Slot | None:
        if not self._can_grow or not self._try_make_place(room):
            return None
        try:
            slot = Slot(self._num_made, room)
        except OSError as error:
            self._can_grow = False
            log.warning("no_shared_memory", bytes=room, reason=str(error), instead="the socket")
            return None
        self._num_made += 1
        self._slots[room].append(slot)
        return slot

    def _try_make_place(self, room: int) -> bool:
        """Retire free slots of other sizes until one more is within the limits."""
        slots = self._all()
        free = [slot for slot in slots if slot.is_free]
        total = sum(slot.room for slot in slots)
        while len(slots) >= NUM_SLOTS or total + room > SLOT_BYTES:
            if not free:
                return False
            gone = free.pop(0)
            slots.remove(gone)
            total -= gone.room
            self._slots[gone.room].remove(gone)
            self.retired.append(gone.number)
        return True


class Borrower:
    """The slots of one direction of a channel, from the end that receives."""

    def __init__(self) -> None:
        self._slots: dict[int, mmap.mmap] = {}

    def take_up(self, number: int, room: int, descriptor: int) -> None:
        """Map a slot that the lender made."""
        total = sum(len(memory) - _STATE_BYTES for memory in self._slots.values())
        if number in self._slots or len(self._slots) >= NUM_SLOTS or total + room > SLOT_BYTES:
            raise BadFrame(f"slot {number} of {room} bytes, beside {len(self._slots)} of {total} bytes")
        size = _STATE_BYTES + room
        if not _is_sealed(descriptor, size):
            raise BadFrame(f"slot {number} isn't {room} bytes of memory that can't shrink")
        self._slots[number] = _map(descriptor, size)

    def forget(self, number: int) -> None:
        """The lender won't use it any more; views of it stay."""
        self._memory(number)
        del self._slots[number]

    def borrow(self, number: int, num_bytes: int) -> Lease:
        """The first bytes of a slot's payload, where they lie."""
        memory = self._memory(number)
        room = len(memory) - _STATE_BYTES
        if num_bytes > room:
            raise BadFrame(f"{num_bytes} bytes in slot {number}, which holds {room}")
        payload = (ctypes.c_ubyte * room).from_buffer(memory, _STATE_BYTES)
        release = _GiveBack(memory)
        weakref.finalize(payload, release).atexit = False
        return Lease(memoryview(payload).cast("B")[:num_bytes], release)

    def close(self) -> None:
        """Unmap what nobody views."""
        self._slots.clear()

    def _memory(self, number: int) -> mmap.mmap:
        try:
            return self._slots[number]
        except KeyError:
            raise BadFrame(f"slot {number}, which was never lent") from None


class _GiveBack:
    """Frees a slot at the first call; later ones, when it may have been lent again, do nothing."""

    __slots__ = ("_memory",)

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = [memory]

    def __call__(self) -> None:
        with suppress(IndexError):
            self._memory.pop()[0] = _FREE  # of two threads that release, one finds it


def check_shared_memory() -> None:
    """`OSError` if this system has none for us."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous memory files (memfd_create)")
    Slot(0, _SMALLEST).close_descriptor()


def _make_file(size: int) -> int:
    descriptor = os.memfd_create("lemix", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_sealed(descriptor: int, size: int) -> bool:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # no file in memory at all
        return False
    return bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(descriptor).st_size == size


def _map(descriptor: int, size: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    if sys.version_info >= (3, 13):
        return mmap.mmap(descriptor, size, flags=flags, trackfd=False)
    return mmap.mmap(descriptor, size, flags=flags)
