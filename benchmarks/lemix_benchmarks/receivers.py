"""The far ends of `hop`: each is a process that waits for messages and says when each was there.

Times are of the host's monotonic clock, which all processes share. A message is there when the receiver holds all of
it (a tensor), or when the broker has confirmed the receiver's acknowledgement (a work item).
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import redis

from lemix_common.broker import connect
from lemix_common.errors import ClusterError, PeerLost
from lemix_common.ids import WorkerId
from lemix_common.store.items import STAGE_0, Items
from lemix_common.transports import Identity, open_transport

SECRET: Final = b"hop"
NODE: Final = 0
RAW_STREAM, RAW_GROUP = "raw:work", "raw"
_BLOCK_S: Final = 1.0
_TIMEOUT_S: Final = 30.0


class Arrivals(Protocol):
    """Where a receiver says that it is ready, then when each message was there."""

    def send(self, at: float) -> None:
        """Say it."""


Receive = Callable[[str, Arrivals], None]


@contextmanager
def receiver(receive: Receive, address: str) -> Iterator[Callable[[], float]]:
    """A process that receives, ready; yielded as a call that waits for its next arrival and returns the time of it."""
    spawn = multiprocessing.get_context("spawn")
    arrivals, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=receive, args=(address, theirs), name=receive.__name__, daemon=True)
    process.start()
    theirs.close()

    def next_arrival() -> float:
        with suppress(EOFError):
            if arrivals.poll(_TIMEOUT_S):
                return float(arrivals.recv())
        raise ClusterError(f"{receive.__name__}: nothing arrived at {address} within {_TIMEOUT_S:g} s")

    try:
        next_arrival()
        yield next_arrival
    finally:
        process.kill()
        process.join()
        arrivals.close()


def receive_frames(address: str, arrivals: Arrivals) -> None:
    """As a stage worker does: frames over a channel, tensors in pooled buffers or where the sender put them."""
    listener = open_transport(Identity(WorkerId("receiver"), SECRET)).listen(address)
    arrivals.send(time.monotonic())
    channel = listener.accept()
    with suppress(PeerLost):
        while True:
            delivery = channel.receive()
            delivery.tensors[0].data[-1]
            at = time.monotonic()
            delivery.release()
            arrivals.send(at)


def receive_bytes(address: str, arrivals: Arrivals) -> None:
    """As little as possible: 8 bytes that say how many follow, and those into one buffer."""
    buffer = memoryview(bytearray(0))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(address)
        listening.listen()
        arrivals.send(time.monotonic())
        connection, _ = listening.accept()
    with connection:
        while prefix := connection.recv(8, socket.MSG_WAITALL):
            num_bytes = int.from_bytes(prefix, "little")
            if num_bytes > len(buffer):
                buffer = memoryview(bytearray(num_bytes))
            connection.recv_into(buffer, num_bytes, socket.MSG_WAITALL)
            arrivals.send(time.monotonic())


def receive_work(url: str, arrivals: Arrivals) -> None:
    """As a node's stage 0 does: pull as a consumer of its group, acknowledge by the store's call."""
    broker = connect(url)
    items, stream = Items(broker), broker.keys.work(NODE)
    broker.ensure_group(stream, STAGE_0)
    arrivals.send(time.monotonic())
    while _has_parent():
        for entry in broker.read_group(stream, STAGE_0, "receiver:1", block_s=_BLOCK_S, count=16):
            broker.call_many([items.close_entry(NODE, entry.id)])
            arrivals.send(time.monotonic())


def receive_raw_work(url: str, arrivals: Arrivals) -> None:
    """The same with redis-py alone."""
    with redis.Redis.from_url(url) as client:
        client.xgroup_create(RAW_STREAM, RAW_GROUP, id="0", mkstream=True)
        arrivals.send(time.monotonic())
        while _has_parent():
            for entry in _raw_entries(client):
                with client.pipeline(transaction=False) as pipe:
                    pipe.xack(RAW_STREAM, RAW_GROUP, entry)
                    pipe.xdel(RAW_STREAM, entry)
                    pipe.execute()
                arrivals.send(time.monotonic())


def _raw_entries(client: redis.Redis) -> list[bytes]:
    block = int(1000 * _BLOCK_S)
    replies: Any = client.xreadgroup(RAW_GROUP, "receiver", {RAW_STREAM: ">"}, count=16, block=block)
    return [entry for _, entries in replies for entry, _ in entries]


def _has_parent() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()
