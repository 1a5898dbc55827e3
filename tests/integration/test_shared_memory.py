"""What only shared memory can do and suffer: slots that are lent, kept, forgotten, and left by the dead."""

from __future__ import annotations

import array
import fcntl
import gc
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from integration.sites import (
    DEADLINE_S,
    Site,
    address_of,
    frame,
    nothing_left_behind,
    peer_process,
    shared_maps,
    site_of,
    tensor,
)
from lemix_common.errors import BadFrame, PeerLost
from lemix_common.transports import Channel, Delivery, slots
from lemix_common.transports.shared_memory import INLINE_BYTES
from lemix_common.transports.streams import SocketChannel
from lemix_common.wire import FRAMES, TensorBuffer

LARGE = INLINE_BYTES + 1


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Each test ends with the threads, sockets and memory it began with."""
    with nothing_left_behind(tmp_path):
        yield


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose workers share memory."""
    with site_of("shm", tmp_path) as opened:
        yield opened


def is_shared(view: memoryview) -> bool:
    """Whether the view's bytes lie in memory that is shared."""
    place = address_of(view)
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= place < end:
            return "memfd:lemix" in line
    return False


def view_of(delivery: Delivery) -> memoryview:
    """Its only tensor's bytes."""
    return delivery.tensors[0].data


# --------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(("num_bytes", "shared"), [(INLINE_BYTES, False), (LARGE, True), (2**22, True)])
def test_large_payloads_are_read_where_the_peer_put_them(site: Site, num_bytes: int, shared: bool) -> None:
    """A payload over `INLINE_BYTES` lies in shared memory and isn't copied; a smaller one goes over the socket."""
    near, far = site.pair()
    sent = TensorBuffer("uint8", (num_bytes,), memoryview(Random(0).randbytes(num_bytes)))
    sending = site.run(lambda: near.send(frame(), [sent]))
    delivery = far.receive()
    sending.result(DEADLINE_S)
    assert view_of(delivery) == sent.data
    assert is_shared(view_of(delivery)) == shared


def test_a_receiver_that_keeps_everything_still_gets_everything(site: Site) -> None:
    """With all slots lent, frames go over the socket; what is kept stays as it was; a freed slot is used again."""
    near, far = site.pair()

    def send() -> None:
        for i in range(40):
            near.send(frame(i), [tensor(LARGE, fill=i)])

    sending = site.run(send)
    kept = [far.receive() for _ in range(40)]
    sending.result(DEADLINE_S)
    are_shared = [is_shared(view_of(delivery)) for delivery in kept]
    assert are_shared == [i < slots.NUM_SLOTS for i in range(40)]
    assert all(view_of(delivery) == bytes([i]) * LARGE for i, delivery in enumerate(kept))
    kept[5].release()
    near.send(frame(), [tensor(LARGE, fill=99)])
    assert address_of(view_of(far.receive())) == address_of(view_of(kept[5]))
    assert view_of(kept[5])[0] == 99


def test_neighbours_that_keep_everything_dont_stop_each_other(site: Site) -> None:
    """Both send more than all slots hold and give nothing back; neither waits for the other's memory."""
    near, far = site.pair()

    def send(end: Channel) -> None:
        for i in range(50):
            end.send(frame(i), [tensor(LARGE)])

    def receive(end: Channel) -> list[Delivery]:
        return [end.receive() for _ in range(50)]

    receiving = [site.run(partial(receive, end)) for end in (near, far)]
    for sending in [site.run(partial(send, end)) for end in (near, far)]:
        sending.result(DEADLINE_S)
    for received in receiving:
        assert [delivery.frame for delivery in received.result(DEADLINE_S)] == [frame(i) for i in range(50)]


def test_a_slot_is_given_back_from_any_thread_and_once(site: Site) -> None:
    """A late second release doesn't free a slot that was lent again."""
    near, far = site.pair()
    near.send(frame(), [tensor(LARGE, fill=1)])
    first = far.receive()
    site.run(first.release).result(DEADLINE_S)
    near.send(frame(), [tensor(LARGE, fill=2)])
    second = far.receive()
    first.release()
    near.send(frame(), [tensor(LARGE, fill=3)])
    assert address_of(view_of(second)) == address_of(view_of(first))
    assert view_of(second)[0] == 2


def test_a_slot_that_nobody_views_any_more_is_free(site: Site) -> None:
    """Who forgets to release gives the slot back with the last view of it, and not before."""
    near, far = site.pair()

    def next_view() -> memoryview:
        near.send(frame(), [tensor(LARGE)])
        return view_of(far.receive())

    view = next_view()[1_000:2_000]
    place = address_of(view)
    assert address_of(next_view()) != place - 1_000
    del view
    gc.collect()
    assert address_of(next_view()) == place - 1_000


def test_slots_of_other_sizes_make_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a channel's limit, idle slots go when another size is asked for; over the limit, the socket is used."""
    monkeypatch.setattr(slots, "SLOT_BYTES", 2**20)
    before = shared_maps()
    near, far = site.pair()
    for num_bytes, shared in ((2**18, True), (2**19, True), (2**20, True), (2**20 + 1, False), (2**18, True)):
        sending = site.run(partial(near.send, frame(), [tensor(num_bytes, fill=7)]))
        delivery = far.receive()
        sending.result(DEADLINE_S)
        assert (is_shared(view_of(delivery)), view_of(delivery)[-1]) == (shared, 7)
        delivery.release()
    del delivery
    gc.collect()
    assert shared_maps() - before == 2  # the last slot, at both ends


def test_memory_that_the_system_cant_give_is_done_without(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames go over the socket then, and one line of the log says why."""
    near, far = site.pair()

    def refuse(size: int) -> int:
        raise OSError(f"{size} bytes are too many")

    monkeypatch.setattr(slots, "_make_file", refuse)
    with capture_logs() as logged:
        for _ in range(3):
            sending = site.run(lambda: near.send(frame(), [tensor(LARGE, fill=1)]))
            assert view_of(far.receive())[-1] == 1
            sending.result(DEADLINE_S)
    assert [line["event"] for line in logged] == ["no_shared_memory"]
    assert "are too many" in logged[0]["reason"]


# --------------------------------------------------------------------------------------- the dead

PEER = """
import sys
from lemix_common.messages import ReleaseItem
from lemix_common.transports import Identity, open_transport
from lemix_common.wire import TensorBuffer

channel = open_transport(Identity("peer", b"a secret")).connect(sys.argv[1])
tensor = TensorBuffer("uint8", (2**20,), memoryview(b"p" * 2**20))
kept = []
for _ in range(int(sys.argv[2])):
    channel.send(ReleaseItem(node=0, stage=0, epoch=0, item="i", attempt=0), [tensor])
for _ in range(int(sys.argv[3])):
    kept.append(channel.receive())
print("done", flush=True)
sys.stdin.read()
"""


def test_a_receiver_that_dies_with_slots_takes_none_along(site: Site) -> None:
    """After ``kill -9`` of a peer that kept ten slots, sending is `PeerLost`, and closing frees all memory."""
    before = shared_maps()
    listener = site.listen()
    with peer_process(PEER, listener.address, "0", "10") as process:
        channel = site.accept(listener)
        for i in range(10):
            channel.send(frame(i), [tensor(2**20)])
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert shared_maps(process.pid) == shared_maps() - before == 10
        process.kill()

    def send_until_lost() -> None:
        while True:
            channel.send(frame(), [tensor(2**20)])

    assert isinstance(site.run(send_until_lost).exception(DEADLINE_S), PeerLost)
    channel.close()
    gc.collect()
    assert shared_maps() == before


def test_what_a_dead_sender_lent_stays_readable(site: Site) -> None:
    """After ``kill -9`` of the peer and the end of the channel, tensors that arrived are what they were."""
    listener = site.listen()
    with peer_process(PEER, listener.address, "10", "0") as process:
        channel = site.accept(listener)
        kept = [channel.receive() for _ in range(10)]
        process.kill()
    with pytest.raises(PeerLost):
        channel.receive()
    channel.close()
    assert all(view_of(delivery) == b"p" * 2**20 for delivery in kept)
    for delivery in kept:
        delivery.release()


# --------------------------------------------------------------------------------------- strange peers


def record(kind: int, number: int, room: int = 0, *, magic: bytes = b"Slot", version: int = 1) -> bytes:
    """What a peer says of a slot."""
    return struct.pack("<4sHHIQ", magic, version, kind, number, room)


LENT, NEW, GONE = range(3)
LARGE_FRAME = bytes(FRAMES.encode(frame(), [tensor(LARGE)])[0])
STRANGE = {
    "an unknown slot": record(LENT, 7) + LARGE_FRAME,
    "an unknown slot that goes": record(GONE, 7),
    "a new slot without memory": record(NEW, 0, 2**17) + LARGE_FRAME,
    "an unknown kind": record(9, 0),
    "another version": record(LENT, 0, version=2),
    "nearly a record": record(LENT, 0, magic=b"Slow"),
}


def say_by_hand(channel: Channel, said: bytes, *descriptors: int) -> None:
    """Send what no worker of ours would."""
    assert isinstance(channel, SocketChannel)
    connection = channel._connection
    assert isinstance(connection, socket.socket)
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([said], passed)


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_slot_is_a_bad_frame(site: Site, name: str) -> None:
    """A peer that speaks of slots that aren't ends its own channel."""
    near, far = site.pair()
    say_by_hand(near, STRANGE[name])
    with pytest.raises(BadFrame):
        far.receive()
    with pytest.raises(PeerLost):
        near.receive()


def memory(num_bytes: int, seals: int) -> int:
    """An anonymous file."""
    descriptor = os.memfd_create("lemix", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


SHRINK, PAGE = 2, 4_096
FILES: dict[str, Callable[[], int]] = {
    "memory that can shrink under us": lambda: memory(PAGE + 2**17, seals=0),
    "less memory than it says": lambda: memory(PAGE, seals=SHRINK),
    "no memory": lambda: os.open("/dev/null", os.O_RDWR),
    "a file": lambda: os.open(sys.executable, os.O_RDONLY),
}


@pytest.mark.parametrize("name", FILES)
def test_memory_that_could_hurt_is_not_mapped(site: Site, name: str) -> None:
    """Only memory that has its size for good is taken: reading another would end the process some day."""
    near, far = site.pair()
    descriptor = FILES[name]()
    say_by_hand(near, record(NEW, 0, 2**17) + LARGE_FRAME, descriptor)
    os.close(descriptor)
    with pytest.raises(BadFrame, match="slot 0"):
        far.receive()


def test_more_than_a_slot_holds_is_refused(site: Site) -> None:
    """A frame larger than its slot isn't read past the slot's end."""
    near, far = site.pair()
    descriptor = memory(PAGE + 2**16, seals=SHRINK)
    say_by_hand(near, record(NEW, 0, 2**16) + LARGE_FRAME, descriptor)
    os.close(descriptor)
    with pytest.raises(BadFrame, match="holds 65536"):
        far.receive()


def test_a_slot_over_the_limits_is_refused(site: Site) -> None:
    """A peer can't make this worker map whatever it likes."""
    near, far = site.pair()
    descriptor = memory(PAGE + 2 * slots.SLOT_BYTES, seals=SHRINK)
    say_by_hand(near, record(NEW, 0, 2 * slots.SLOT_BYTES) + LARGE_FRAME, descriptor)
    os.close(descriptor)
    with pytest.raises(BadFrame, match="slot 0"):
        far.receive()


def test_descriptors_that_no_slot_is_made_of_are_refused(site: Site) -> None:
    """A peer can't use up this worker's file descriptors."""
    near, far = site.pair()
    descriptor = memory(PAGE + 2**17, seals=SHRINK)
    say_by_hand(near, record(NEW, 0, 2**17), descriptor, descriptor)
    os.close(descriptor)
    with pytest.raises(BadFrame, match="no slot"):
        far.receive()
