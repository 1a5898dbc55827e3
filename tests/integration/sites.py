"""Where workers of a transport's tests meet, and what they say there."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TypeVar

from lemix_common.broker import Broker
from lemix_common.ids import WorkerId
from lemix_common.messages import ReleaseItem
from lemix_common.transports import (
    BufferPool,
    Channel,
    Identity,
    Listener,
    Timeouts,
    Transport,
    open_transport,
)
from lemix_common.wire import ITEM_BYTES, TensorBuffer

SECRET = b"a secret"
NEAR = Identity(WorkerId("near"), SECRET)
FAR = Identity(WorkerId("far"), SECRET)
STRANGER = Identity(WorkerId("stranger"), b"another secret")
PATIENT = Timeouts(hello_s=10.0, send_s=10.0)
DEADLINE_S = 10.0
SHARED_FOLDER = Path("/dev/shm")
"""Where named shared memory would be left."""

T = TypeVar("T")


def frame(attempt: int = 0, item: str = "item") -> ReleaseItem:
    """A frame that is told from others by a number."""
    return ReleaseItem(node=0, stage=1, epoch=2, item=item, attempt=attempt)


def tensor(*shape: int, dtype: str = "uint8", fill: int = 0) -> TensorBuffer:
    """A tensor whose bytes are all alike."""
    return TensorBuffer(dtype, shape, memoryview(bytes([fill]) * (ITEM_BYTES[dtype] * prod(shape))))


def address_of(view: memoryview) -> int:
    """Where the view's bytes lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Return as soon as it holds; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s until {what}"
        pause.wait(0.002)


def open_files() -> set[str]:
    """The sockets and the shared memory of this process, by their names in /proc."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.add(str(descriptor.readlink()))
        except FileNotFoundError:  # the directory's own
            continue
    return {link for link in links if link.startswith(("socket:", "/memfd:"))}


def shared_maps(pid: int | str = "self") -> int:
    """How many maps of shared memory the process has."""
    return sum("memfd:lemix" in line for line in Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines())


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """It ends with the threads, sockets and shared memory it began with, and without socket files."""
    threads, files = set(threading.enumerate()), open_files()
    named, maps = set(SHARED_FOLDER.iterdir()), shared_maps()
    yield
    wait_until(lambda: set(threading.enumerate()) <= threads, "all threads had ended")
    if not open_files() <= files or shared_maps() > maps:
        gc.collect()  # what only cycles hold isn't left behind
    assert open_files() <= files
    assert shared_maps() <= maps
    assert set(SHARED_FOLDER.iterdir()) <= named
    assert not [path for path in folder.rglob("*") if path.is_socket()]


@dataclass
class Site:
    """Where a test's workers meet: it makes transports and addresses of one scheme, and closes what they opened."""

    scheme: str
    folder: Path
    broker: Broker | None = None
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))
    opened: list[Channel | Listener] = field(default_factory=list)

    def transport(
        self, identity: Identity = FAR, *, timeouts: Timeouts = PATIENT, pool: BufferPool | None = None
    ) -> Transport:
        """A worker's."""
        return open_transport(identity, timeouts=timeouts, pool=pool, broker=self.broker)

    def address(self, name: str = "a") -> str:
        """An address that nobody listens at."""
        match self.scheme:
            case "tcp":
                return "tcp:127.0.0.1:0"
            case "redis":
                return f"redis:{name}"
            case _:
                return f"{self.scheme}:{self.folder}/{name}"

    def listen(self, transport: Transport | None = None, address: str | None = None) -> Listener:
        """Listen, as the far worker if nobody else is named."""
        listener = (transport or self.transport(FAR)).listen(address or self.address())
        self.opened.append(listener)
        return listener

    def connect(self, address: str, transport: Transport | None = None) -> Channel:
        """Connect, as the near worker if nobody else is named."""
        channel = (transport or self.transport(NEAR)).connect(address)
        self.opened.append(channel)
        return channel

    def accept(self, listener: Listener) -> Channel:
        """The next channel at the listener."""
        channel = self.run(listener.accept).result(DEADLINE_S)
        self.opened.append(channel)
        return channel

    def pair(
        self, *, timeouts: Timeouts = PATIENT, pool: BufferPool | None = None
    ) -> tuple[Channel, Channel]:
        """A channel's near and far end; the near end has the time-outs, both have the pool."""
        listener = self.listen(self.transport(FAR, pool=pool))
        near = self.connect(listener.address, self.transport(NEAR, timeouts=timeouts, pool=pool))
        return near, self.accept(listener)

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Run in another thread."""
        return self.threads.submit(function)


@contextmanager
def site_of(scheme: str, folder: Path, broker: Broker | None = None) -> Iterator[Site]:
    """A site, and its end."""
    site = Site(scheme, folder, broker)
    try:
        yield site
    finally:
        for opened in reversed(site.opened):
            opened.close()
        site.threads.shutdown()


@contextmanager
def peer_process(program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, which ends with the test; it imports what this one can."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
