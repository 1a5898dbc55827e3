"""Receive buffers that are used again and again.

Memory that was never written costs a page fault per 4 KB at its first touch, which is several times slower
than the copy itself. So buffers come in size classes (powers of two), each is a map of its own (page-aligned,
hence also 64-byte-aligned), and a released one goes back to its class with its pages in place. The pool holds
on to idle buffers only, at most ``idle_bytes`` of them (the sizes asked for least recently go first): a
buffer that is out belongs to who took it, and if it is never released, it is unmapped when the last view of
it is gone.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from threading import Lock
from typing import Final, NamedTuple

_SMALLEST: Final = 2**14
_TOUCHED_AT_ONCE: Final = 2**20
"""Larger maps are touched by their first frame instead, inside the kernel and without Python's lock."""


class Lease(NamedTuple):
    """A buffer of exactly the bytes asked for, and how to give it back."""

    view: memoryview
    release: Callable[[], None]


class BufferPool:
    """Buffers by size class; safe from any thread."""

    def __init__(self, idle_bytes: int = 2**29) -> None:
        self._idle_limit = idle_bytes
        self._idle_bytes = 0
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._lock = Lock()

    def take(self, num_bytes: int) -> Lease:
        """A writable buffer, warm if there is one; its content is whatever it last held."""
        if num_bytes == 0:
            return _NOTHING
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        buffer = self._try_idle(size) or _fresh(size)
        return Lease(memoryview(buffer)[:num_bytes], _OneReturn(self, buffer))

    def _try_idle(self, size: int) -> mmap.mmap | None:
        with self._lock:
            idle = self._idle.pop(size, [])
            self._idle[size] = idle  # now the last class to be evicted
            if not idle:
                return None
            self._idle_bytes -= size
            return idle.pop()

    def take_back(self, buffer: mmap.mmap) -> None:
        """Keep the buffer for the next of its size; a lease calls this once."""
        with self._lock:
            self._idle.setdefault(len(buffer), []).append(buffer)
            self._idle_bytes += len(buffer)
            while self._idle_bytes > self._idle_limit:
                self._evict()

    def _evict(self) -> None:
        size, idle = next(iter(self._idle.items()))
        if idle:
            idle.pop()
            self._idle_bytes -= size
        else:
            del self._idle[size]


class _OneReturn:
    """Gives a buffer back at the first call and forgets it; later calls do nothing."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: mmap.mmap) -> None:
        self._pool = pool
        self._buffer = [buffer]

    def __call__(self) -> None:
        try:
            buffer = self._buffer.pop()  # atomic: of two threads that release, one finds it
        except IndexError:
            return
        self._pool.take_back(buffer)


def _fresh(size: int) -> mmap.mmap:
    touch = getattr(mmap, "MAP_POPULATE", 0) if size <= _TOUCHED_AT_ONCE else 0
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | touch)


_NOTHING: Final = Lease(memoryview(bytearray()), lambda: None)
