"""What every transport promises, alike over memory, shared memory, Unix sockets, TCP and the broker.

Then what only sockets suffer.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import pytest

from integration.sites import (
    DEADLINE_S,
    FAR,
    NEAR,
    PATIENT,
    STRANGER,
    Site,
    address_of,
    frame,
    nothing_left_behind,
    peer_process,
    site_of,
    tensor,
    wait_until,
)
from lemix_common.broker import connect
from lemix_common.errors import BadFrame, ClusterError, PeerLost, PeerRefused, SettingsError
from lemix_common.ids import WorkerId
from lemix_common.messages import ReleaseItem
from lemix_common.transports import BufferPool, Channel, Identity, Listener, Timeouts, open_transport
from lemix_common.transports.addresses import parse_address
from lemix_common.transports.handshake import (
    GREETINGS,
    Answer,
    Challenge,
    Greeting,
    Hello,
    Welcome,
    greet_connector,
)
from lemix_common.transports.streams import SocketChannel
from lemix_common.wire import FRAMES, ITEM_BYTES, PRELUDE_BYTES, TensorBuffer


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """Each test ends with the threads, sockets and memory it began with."""
    with nothing_left_behind(tmp_path):
        yield


@pytest.fixture(params=["memory", "shm", "unix", "tcp", "redis"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site of every scheme."""
    if request.param != "redis":
        with site_of(request.param, tmp_path) as opened:
            yield opened
        return
    broker = connect(request.getfixturevalue("server").url, "transports")
    with site_of("redis", tmp_path, broker) as opened:
        yield opened
    assert broker.client.pubsub_channels() == []
    assert not broker.client.keys(f"{broker.keys.prefix}*")
    broker.client.connection_pool.disconnect()


@pytest.fixture(params=["shm", "unix", "tcp"])
def socket_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site of every scheme whose peers can be something else than this program."""
    with site_of(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture(params=["shm", "unix"])
def unix_site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site whose addresses are files."""
    with site_of(request.param, tmp_path) as opened:
        yield opened


# --------------------------------------------------------------------------------------- frames


def test_each_end_knows_the_other(site: Site) -> None:
    """A channel names the worker at its other end."""
    near, far = site.pair()
    assert (near.peer, far.peer) == ("far", "near")


def test_frames_arrive_in_order_both_ways(site: Site) -> None:
    """What one thread sends arrives in that order, in both directions of one channel."""
    near, far = site.pair()
    for sender, receiver in ((near, far), (far, near)):
        sending = site.run(partial(send_numbered, sender, 500))
        received = [receiver.receive() for _ in range(500)]
        sending.result(DEADLINE_S)
        assert [delivery.frame for delivery in received] == [frame(i) for i in range(500)]
        assert [delivery.tensors[0].shape for delivery in received] == [(i,) for i in range(500)]


def send_numbered(channel: Channel, num_frames: int) -> None:
    """Frames that are told apart by their number and their tensor's length."""
    for i in range(num_frames):
        channel.send(frame(i), [tensor(i)])


def test_a_frame_needs_no_tensors(site: Site) -> None:
    """Most of what is said between workers is only said."""
    near, far = site.pair()
    near.send(frame(1))
    delivery = far.receive()
    delivery.release()
    assert (delivery.frame, delivery.tensors) == (frame(1), ())


def test_a_large_tensor_arrives_whole(site: Site) -> None:
    """32 MB arrive byte for byte."""
    near, far = site.pair()
    memory = memoryview(os.urandom(2**20) * 32)
    sending = site.run(lambda: near.send(frame(), [TensorBuffer("float32", (2**23,), memory)]))
    _, (received,), release = far.receive()
    sending.result(DEADLINE_S)
    assert received.shape == (2**23,)
    assert received.data == memory
    release()


def test_every_type_and_odd_shapes_arrive(site: Site) -> None:
    """Each element type, empty tensors and a scalar keep their place among others."""
    near, far = site.pair()
    sent = [tensor(3, dtype=dtype, fill=i) for i, dtype in enumerate(ITEM_BYTES)]
    sent += [tensor(0), tensor(dtype="float32", fill=9), tensor(2, 0, 3, dtype="int64"), tensor(1, 5, fill=8)]
    near.send(frame(), sent)
    assert list(far.receive().tensors) == sent


def test_thousands_of_tensors_arrive(site: Site) -> None:
    """A frame may have more pieces than the system takes at once."""
    near, far = site.pair()
    sent = [tensor(i % 7, fill=i % 251) for i in range(4_000)]
    sending = site.run(lambda: near.send(frame(), sent))
    assert list(far.receive().tensors) == sent
    sending.result(DEADLINE_S)


def test_received_tensors_are_aligned_and_writable(site: Site) -> None:
    """Each tensor begins at a multiple of 64 bytes, so that any library can use it where it lies."""
    near, far = site.pair()
    near.send(frame(), [tensor(n) for n in (1, 65, 3, 100_000, 1)])
    views = [received.data for received in far.receive().tensors]
    assert [address_of(view) % 64 for view in views] == [0] * 5
    assert not any(view.readonly for view in views)


def test_threads_share_a_channel(site: Site) -> None:
    """Frames from several threads never mix, and each thread's stay in order."""
    near, far = site.pair()

    def send(thread: int) -> None:
        for i in range(50):
            near.send(frame(i, item=str(thread)), [tensor(5_000 * thread + i, fill=thread)])

    sending = [site.run(partial(send, thread)) for thread in range(8)]
    attempts: dict[str, list[int]] = {}
    for _ in range(8 * 50):
        said, (received,), release = far.receive()
        assert isinstance(said, ReleaseItem)
        thread = int(said.item)
        assert received.data == bytes([thread]) * (5_000 * thread + said.attempt)
        attempts.setdefault(said.item, []).append(said.attempt)
        release()
    assert list(attempts.values()) == [list(range(50))] * 8
    for sent in sending:
        sent.result(DEADLINE_S)


def test_neighbours_can_send_to_each_other_at_once(site: Site) -> None:
    """With both receiving, large frames in both directions don't wait for each other."""
    near, far = site.pair()

    def send_eight(end: Channel) -> None:
        for i in range(8):
            end.send(frame(i), [tensor(2**22)])

    def receive_eight(end: Channel) -> None:
        for _ in range(8):
            end.receive().release()

    work = [site.run(partial(doing, end)) for end in (near, far) for doing in (send_eight, receive_eight)]
    for done in work:
        done.result(DEADLINE_S)


def test_sent_memory_belongs_to_its_sender_again(site: Site) -> None:
    """When `send` returns, overwriting the tensor doesn't change what arrives."""
    near, far = site.pair()
    memory = bytearray(b"\x01" * 1_000)
    near.send(frame(), [TensorBuffer("uint8", (1_000,), memoryview(memory))])
    memory[:] = b"\x02" * 1_000
    assert far.receive().tensors[0].data == b"\x01" * 1_000


# --------------------------------------------------------------------------------------- buffers


def test_released_memory_is_used_again_and_kept_memory_is_not(site: Site) -> None:
    """A released buffer holds a later frame; tensors that weren't released never change."""
    near, far = site.pair(pool=BufferPool())

    def next_tensor(fill: int) -> tuple[memoryview, Callable[[], None]]:
        near.send(frame(), [tensor(100_000, fill=fill)])
        _, (received,), release = far.receive()
        return received.data, release

    kept, _ = next_tensor(1)
    used, release = next_tensor(2)
    release()
    release()
    again, _ = next_tensor(3)
    other, _ = next_tensor(4)
    assert address_of(again) == address_of(used)
    assert len({address_of(view) for view in (kept, again, other)}) == 3
    assert (kept[0], again[0], other[0]) == (1, 3, 4)


def test_the_pool_keeps_no_more_than_it_may() -> None:
    """Idle buffers are bounded, and those of sizes nobody asks for any more go first."""
    pool = BufferPool(idle_bytes=2**17)
    small = [pool.take(2**14) for _ in range(8)]
    for lease in small:
        lease.release()
    large = pool.take(2**16)
    large_address = address_of(large.view)
    large.release()
    assert address_of(pool.take(2**16).view) == large_address
    warm = {address_of(lease.view) for lease in small}
    taken = [pool.take(2**14) for _ in range(8)]
    assert len(warm & {address_of(lease.view) for lease in taken}) == 4


# --------------------------------------------------------------------------------------- ends


def test_closing_wakes_the_receiver(site: Site) -> None:
    """A thread that waits in `receive` gets `PeerLost` when another closes the channel."""
    near, _ = site.pair()
    receiving = site.run(near.receive)
    near.close()
    assert isinstance(receiving.exception(DEADLINE_S), PeerLost)


def test_closing_wakes_the_sender(site: Site) -> None:
    """A thread that is blocked in `send` gets `PeerLost` when another closes the channel."""
    near, _ = site.pair()
    started = threading.Event()

    def send() -> None:
        while True:
            near.send(frame(), [tensor(2**20)])
            started.set()

    sending = site.run(send)
    assert started.wait(DEADLINE_S)
    near.close()
    assert isinstance(sending.exception(DEADLINE_S), PeerLost)


def test_what_was_sent_before_the_end_still_arrives(site: Site) -> None:
    """A receiver that is behind gets the frames that were sent, then `PeerLost`, again and again."""
    near, far = site.pair()
    near.send(frame(1), [tensor(1_000)])
    near.send(frame(2))
    near.close()
    assert [far.receive().frame, far.receive().frame] == [frame(1), frame(2)]
    for _ in range(2):
        with pytest.raises(PeerLost):
            far.receive()


def test_an_ended_channel_sends_nothing(site: Site) -> None:
    """After the end, here or there, `send` raises `PeerLost` and doesn't block; closing twice is fine."""
    near, far = site.pair()
    far.close()
    far.close()
    with pytest.raises(PeerLost):
        far.send(frame())
    with pytest.raises(PeerLost):
        near.receive()
    for _ in range(2):
        with pytest.raises(PeerLost):
            near.send(frame())


def test_a_peer_that_takes_nothing_is_lost(site: Site) -> None:
    """A peer that doesn't receive is lost after the send time-out, and the channel with it."""
    near, _ = site.pair(timeouts=Timeouts(send_s=0.2))
    took: list[float] = []

    def send_until_lost() -> None:
        while True:
            began = time.monotonic()
            try:
                near.send(frame(), [tensor(2**20)])
            finally:
                took.append(time.monotonic() - began)

    assert isinstance(site.run(send_until_lost).exception(DEADLINE_S), PeerLost)
    assert 0.05 < took[-1] < 2.0
    with pytest.raises(PeerLost):
        near.receive()


def test_a_frame_that_breaks_a_rule_isnt_sent_and_hurts_nobody(site: Site) -> None:
    """The sender's mistake is a `BadFrame` for the sender; the channel lives."""
    near, far = site.pair()
    mistakes = [tensor(*[1] * 9), TensorBuffer("float32", (2,), memoryview(bytes(7)))]
    for mistake in mistakes:
        with pytest.raises(BadFrame):
            near.send(frame(), [mistake])
    with pytest.raises(BadFrame):
        near.send(frame(), [tensor(0)] * 5_000)
    near.send(frame(1))
    assert far.receive().frame == frame(1)


# --------------------------------------------------------------------------------------- meeting


def test_another_secret_is_refused_at_both_ends(site: Site) -> None:
    """A worker of another cluster is refused and told so; the listener goes on."""
    listener = site.listen()
    accepting = site.run(listener.accept)
    with pytest.raises(PeerRefused, match="secret"):
        site.connect(listener.address, site.transport(STRANGER))
    assert isinstance(accepting.exception(DEADLINE_S), PeerRefused)
    near = site.connect(listener.address)
    site.accept(listener).send(frame(1))
    assert near.receive().frame == frame(1)


def test_nobody_there_is_a_lost_peer(site: Site) -> None:
    """Connecting to where nobody listens any more is `PeerLost`."""
    listener = site.listen()
    listener.close()
    with pytest.raises(PeerLost, match="nobody answers"):
        site.connect(listener.address)


def test_listeners_dont_share_their_peers(site: Site) -> None:
    """Two listeners each get who connected to them."""
    first = site.listen()
    second = site.listen(site.transport(NEAR), site.address("b"))
    assert first.address != second.address
    assert [site.connect(listener.address).peer for listener in (second, first)] == ["near", "far"]
    site.accept(first)
    site.accept(second)


def test_an_address_can_be_had_once(site: Site) -> None:
    """Listening where somebody listens is refused and takes nothing away; after its end it is free."""
    first = site.listen()
    with pytest.raises(ClusterError, match="can't listen"):
        site.listen(address=first.address)
    site.connect(first.address)
    first.close()
    site.connect(site.listen(address=first.address).address)


def test_closing_a_listener_wakes_who_accepts(site: Site) -> None:
    """All who wait in `accept` get `PeerLost`, also later; closing twice is fine."""
    listener = site.listen()
    waiting = [site.run(listener.accept) for _ in range(2)]
    listener.close()
    listener.close()
    for accepting in waiting:
        assert isinstance(accepting.exception(DEADLINE_S), PeerLost)
    with pytest.raises(PeerLost):
        listener.accept()


def test_channels_outlive_their_listener_if_they_were_accepted(site: Site) -> None:
    """Closing a listener ends the channels that nobody accepted, and no others."""
    listener = site.listen()
    near = site.connect(listener.address)
    far = site.accept(listener)
    forgotten = site.connect(listener.address)
    listener.close()
    far.send(frame(1))
    assert near.receive().frame == frame(1)
    with pytest.raises(PeerLost):
        forgotten.receive()


def test_a_lost_peer_can_come_back(site: Site) -> None:
    """After a loss a new channel to the same listener carries frames."""
    listener = site.listen()
    for attempt in range(3):
        near = site.connect(listener.address)
        far = site.accept(listener)
        near.send(frame(attempt))
        assert far.receive().frame == frame(attempt)
        near.close()
        with pytest.raises(PeerLost):
            far.receive()


@pytest.mark.parametrize(
    "text",
    [
        *("", "unix:", "shm:", "memory:", "udp:host:1", "/path"),
        *("tcp:host", "tcp::80", "tcp:host:-1", "tcp:host:65536", "redis:", "redis:a b", "redis:a:b"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """The message shows what an address looks like."""
    with pytest.raises(SettingsError, match="tcp:host:port"):
        open_transport(NEAR).connect(text)


@pytest.mark.parametrize(
    "text", ["unix:/run/a:b", "shm:/run/a b", "tcp:host:80", "tcp:[::1]:0", "memory:a", "redis:w-1.a_b"]
)
def test_an_address_is_written_as_it_is_read(text: str) -> None:
    """Addresses travel as text."""
    assert str(parse_address(text)) == text


def test_a_secret_is_needed_and_not_shown() -> None:
    """An empty secret would let anybody in; a secret is in no log."""
    with pytest.raises(SettingsError):
        Identity(WorkerId("near"), b"")
    assert "secret" not in repr(NEAR)


# --------------------------------------------------------------------------------------- sockets only


def raw_connection(listener: Listener) -> socket.socket:
    """A connection from somebody who knows the address and nothing else."""
    scheme, _, rest = listener.address.partition(":")
    if scheme == "tcp":
        host, port = rest.split(":")
        connection = socket.create_connection((host, int(port)))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(rest)
    connection.settimeout(DEADLINE_S)
    return connection


def was_dropped(connection: socket.socket) -> bool:
    """Whether the other end ends the connection (what it had said before is read and forgotten)."""
    with suppress(ConnectionError):
        while connection.recv(1_024):
            continue
    return True


def greeting(said: Greeting) -> bytes:
    """A greeting's bytes."""
    return b"".join(GREETINGS.encode(said))


HELLO = greeting(Hello("somebody", "0" * 64))
GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "zeros": bytes(4_096),
    "another wire version": HELLO[:4] + b"\xff" + HELLO[5:],
    "a hello over the limit": HELLO[:8] + b"\xff\xff\xff\x7f" + HELLO[12:],
    "a hello with tensors": HELLO[:12] + b"\xff" * 8 + HELLO[20:],
    "a frame before the hello": b"".join(FRAMES.encode(frame())),
    "the wrong greeting": greeting(Welcome()),
    "a wrong answer": HELLO + greeting(Answer("0" * 64)),
    "noise in the header": HELLO[:30] + bytes(range(200, 230)) + HELLO[60:],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_stranger_is_dropped_and_nobody_else(socket_site: Site, name: str) -> None:
    """Whatever comes instead of a hello is refused with a named error; channels and listener live."""
    listener = socket_site.listen()
    near, far = socket_site.connect(listener.address), socket_site.accept(listener)
    with raw_connection(listener) as stranger:
        stranger.sendall(GARBAGE[name])
        with pytest.raises((PeerRefused, BadFrame)):
            socket_site.accept(listener)
        assert was_dropped(stranger)
    near.send(frame(1))
    assert far.receive().frame == frame(1)
    socket_site.connect(listener.address)
    socket_site.accept(listener)


def test_a_stranger_that_says_nothing_keeps_nobody_waiting(socket_site: Site) -> None:
    """While a silent connection runs into the hello time-out, peers are accepted; then it is refused."""
    listener = socket_site.listen(socket_site.transport(FAR, timeouts=Timeouts(hello_s=0.3)))
    with raw_connection(listener) as silent:
        socket_site.connect(listener.address)
        assert socket_site.accept(listener).peer == "near"
        with pytest.raises(PeerRefused, match="hello"):
            socket_site.accept(listener)
        assert was_dropped(silent)


def test_a_hello_that_trickles_in_runs_out_of_time(socket_site: Site) -> None:
    """The hello's time-out is for all of it, not for each byte."""
    listener = socket_site.listen(socket_site.transport(FAR, timeouts=Timeouts(hello_s=0.2)))
    refused = socket_site.run(listener.accept)
    pause = threading.Event()
    with raw_connection(listener) as slow:
        for index in range(len(HELLO)):
            if refused.done():
                break
            try:
                slow.send(HELLO[index : index + 1])
            except ConnectionError:
                break
            pause.wait(0.02)
        assert isinstance(refused.exception(DEADLINE_S), PeerRefused)


def test_many_strangers_are_bounded(socket_site: Site) -> None:
    """A flood of connections holds a bounded number of threads; when it is over, peers get in again."""
    listener = socket_site.listen()
    before = threading.active_count()
    flood = [raw_connection(listener) for _ in range(100)]
    dropped = socket_site.run(lambda: was_dropped(flood[-1]))
    assert dropped.result(DEADLINE_S)
    assert threading.active_count() <= before + 65
    for stranger in flood:
        stranger.close()
    for _ in range(64):
        with pytest.raises(PeerRefused):
            socket_site.accept(listener)
    socket_site.connect(listener.address)
    assert socket_site.accept(listener).peer == "near"


def test_a_listener_that_is_closed_ends_hellos_that_go_on(socket_site: Site) -> None:
    """Closing doesn't wait for strangers' time-outs."""
    listener = socket_site.listen()
    with raw_connection(listener) as silent:
        wait_until(lambda: any("hello" in thread.name for thread in threading.enumerate()), "it was met")
        began = time.monotonic()
        listener.close()
        assert time.monotonic() - began < PATIENT.hello_s / 2
        assert was_dropped(silent)


def test_a_proof_fits_one_conversation_and_one_direction() -> None:
    """A listener's own proof sent back to it, and a proof heard in another conversation, are refused."""
    said: list[object] = []

    def answer_with_its_own_proof() -> Greeting:
        if not said:
            return Hello("somebody", "0" * 64)
        challenge = said[-1]
        assert isinstance(challenge, Challenge)
        return Answer(challenge.proof)

    with pytest.raises(PeerRefused):
        greet_connector(FAR, said.append, answer_with_its_own_proof)
    recorded = said[-1]
    assert isinstance(recorded, Challenge)
    script: Iterator[Greeting] = iter([Hello("somebody", "0" * 64), Answer(recorded.proof)])
    with pytest.raises(PeerRefused):
        greet_connector(FAR, said.append, lambda: next(script))


def sent_by_hand(header: bytes, *, num_tensors: int = 1, payload_bytes: int = 0) -> bytes:
    """A frame with a well-formed prelude."""
    prelude = bytearray(FRAMES.encode(frame())[0][:PRELUDE_BYTES])
    prelude[6:8] = num_tensors.to_bytes(2, "little")
    prelude[8:12] = len(header).to_bytes(4, "little")
    prelude[12:20] = payload_bytes.to_bytes(8, "little")
    return bytes(prelude) + header


def header_with(*table: object) -> bytes:
    """A header whose tensors are described so."""
    header: bytes = msgpack.packb((FRAMES.codec.encode(frame()), table))
    return header


def say_by_hand(channel: Channel, said: bytes) -> None:
    """Send what no worker of ours would."""
    assert isinstance(channel, SocketChannel)
    assert isinstance(channel._connection, socket.socket)
    channel._connection.sendall(said)


BAD_FRAMES = {
    "noise": b"noise" * 10,
    "nine dimensions": sent_by_hand(header_with(("uint8", [1] * 9, 1)), payload_bytes=1),
    "an absurd length": sent_by_hand(header_with(("uint8", [0, 2**60], 0))),
    "a wrong size": sent_by_hand(header_with(("float32", [2], 7)), payload_bytes=7),
    "a payload over the limit": sent_by_hand(b"", payload_bytes=2**60),
    "tensors over the limit": sent_by_hand(b"", num_tensors=5_000),
    "an empty header": sent_by_hand(b"", num_tensors=0),
    "a greeting after the hello": greeting(Welcome()),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_ends_its_channel_only(socket_site: Site, name: str) -> None:
    """A peer that sends what can't be read is a `BadFrame`, its connection is dropped, others live."""
    listener = socket_site.listen()
    near, far = socket_site.connect(listener.address), socket_site.accept(listener)
    other_near, other_far = socket_site.connect(listener.address), socket_site.accept(listener)
    say_by_hand(near, BAD_FRAMES[name])
    with pytest.raises(BadFrame):
        far.receive()
    with pytest.raises(PeerLost):
        far.receive()
    with pytest.raises(PeerLost):
        near.receive()
    other_near.send(frame(1))
    assert other_far.receive().frame == frame(1)


def test_a_frame_that_ends_early_is_never_delivered(socket_site: Site) -> None:
    """A connection that ends within a frame, wherever, is a lost peer."""
    listener = socket_site.listen()
    whole = b"".join(FRAMES.encode(frame(), [tensor(50_000)]))
    for cut in (1, PRELUDE_BYTES, PRELUDE_BYTES + 5, len(whole) - 40_000, len(whole) - 1):
        near, far = socket_site.connect(listener.address), socket_site.accept(listener)
        say_by_hand(near, whole[:cut])
        near.close()
        with pytest.raises(PeerLost):
            far.receive()


PEER = """
import sys
from lemix_common.messages import ReleaseItem
from lemix_common.transports import Identity, open_transport
from lemix_common.wire import TensorBuffer

channel = open_transport(Identity("peer", b"a secret")).connect(sys.argv[1])
tensor = TensorBuffer("uint8", (2**20,), memoryview(bytes(2**20)))
while True:
    channel.send(ReleaseItem(node=0, stage=0, epoch=0, item="i", attempt=0), [tensor])
"""


def test_a_killed_peer_is_lost(socket_site: Site) -> None:
    """``kill -9`` of a worker in the middle of its frames is `PeerLost` for its neighbour's two threads."""
    listener = socket_site.listen()
    with peer_process(PEER, listener.address) as process:
        far = socket_site.accept(listener)
        for _ in range(20):
            far.receive().release()
        process.send_signal(signal.SIGKILL)

    def receive_all() -> None:
        while True:
            far.receive().release()

    def send_all() -> None:
        while True:
            far.send(frame(), [tensor(2**20)])

    for work in (receive_all, send_all):
        assert isinstance(socket_site.run(work).exception(DEADLINE_S), PeerLost)


# --------------------------------------------------------------------------------------- socket files


def test_a_socket_file_is_private_and_goes_with_its_listener(unix_site: Site) -> None:
    """Only its owner can connect to it; closing the listener removes it."""
    listener = unix_site.listen()
    file = Path(listener.address.partition(":")[2])
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR
    listener.close()
    assert not file.exists()


def test_a_dead_workers_socket_file_is_replaced(unix_site: Site) -> None:
    """A worker that was killed leaves its file; the next one listens there."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(unix_site.address().partition(":")[2])
    listener = unix_site.listen()
    unix_site.connect(listener.address)
    unix_site.accept(listener)


def test_a_file_that_is_no_socket_is_left_alone(unix_site: Site) -> None:
    """An address that names somebody's file is refused, and the file stays."""
    file = Path(unix_site.address().partition(":")[2])
    file.write_text("precious")
    with pytest.raises(ClusterError):
        unix_site.listen()
    assert file.read_text() == "precious"


def test_a_socket_file_of_somebody_else_is_left_alone(unix_site: Site) -> None:
    """A listener whose file was replaced doesn't remove the other's."""
    first = unix_site.listen()
    Path(first.address.partition(":")[2]).unlink()
    second = unix_site.listen(address=first.address)
    first.close()
    unix_site.connect(second.address)
