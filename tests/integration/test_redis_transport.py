"""What only tensors through the broker suffer: a peer nobody can see, a broker that goes away, letters of strangers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from integration.sites import (
    DEADLINE_S,
    NEAR,
    Site,
    frame,
    nothing_left_behind,
    peer_process,
    site_of,
    tensor,
)
from lemix_common.broker import Broker, connect
from lemix_common.errors import ClusterError, PeerLost, PeerRefused, SettingsError
from lemix_common.server import RunningBroker, start_broker
from lemix_common.transports import Channel, open_transport
from lemix_common.transports.broker_streams import WINDOW_BYTES, BrokerConnection
from lemix_common.transports.streams import SocketChannel


@pytest.fixture(autouse=True)
def _nothing_left_behind(server: RunningBroker, tmp_path: Path) -> Iterator[None]:
    """Each test ends with the threads and sockets it began with."""
    del server  # it only has to be there before anything is counted
    with nothing_left_behind(tmp_path):
        yield


@pytest.fixture
def broker(server: RunningBroker) -> Iterator[Broker]:
    """A cluster's broker; each test leaves no key and no subscription there."""
    opened = connect(server.url, "transports")
    yield opened
    assert opened.client.pubsub_channels() == []
    assert not opened.client.keys(f"{opened.keys.prefix}*")
    opened.client.connection_pool.disconnect()


@pytest.fixture
def site(broker: Broker, tmp_path: Path) -> Iterator[Site]:
    """A site whose workers have only the broker in common."""
    with site_of("redis", tmp_path, broker) as opened:
        yield opened


def connection_of(channel: Channel) -> BrokerConnection:
    """What carries the channel."""
    assert isinstance(channel, SocketChannel)
    assert isinstance(channel._connection, BrokerConnection)
    return channel._connection


def test_it_says_that_it_is_slow(site: Site) -> None:
    """Who connects this way reads in the log what it costs and what to do."""
    listener = site.listen()
    with capture_logs() as logged:
        site.connect(listener.address)
    (line,) = (line for line in logged if line["event"] == "slow_transport")
    assert (line["log_level"], line["peer"]) == ("warning", "far")
    assert "--listen tcp:" in line["instead"]


def test_tensors_enter_no_key_and_no_durable_log(site: Site, broker: Broker) -> None:
    """While 8 MB go through it, the broker has nothing more to keep than before."""

    def kept() -> tuple[object, ...]:
        persistence = broker.client.info("persistence")
        assert isinstance(persistence, dict)
        return broker.client.dbsize(), persistence["aof_current_size"]

    near, far = site.pair()
    before = kept()
    sending = site.run(lambda: near.send(frame(), [tensor(2**23, fill=1)]))
    delivery = far.receive()
    sending.result(DEADLINE_S)
    assert bytes(delivery.tensors[0].data[-1:]) == b"\x01"
    assert kept() == before


def test_what_is_on_its_way_is_bounded(site: Site) -> None:
    """A sender whose peer doesn't receive waits when the window is full; nobody holds more than that."""
    near, far = site.pair()
    sending = site.run(lambda: near.send(frame(), [tensor(3 * WINDOW_BYTES)]))
    with connection_of(near)._changed:
        assert connection_of(near)._changed.wait_for(lambda: not connection_of(near)._room, DEADLINE_S)
    assert not sending.done()
    assert sum(map(len, connection_of(far)._arrived)) <= WINDOW_BYTES
    far.receive().release()
    sending.result(DEADLINE_S)


PEER = """
import os, sys
from lemix_common.broker import connect
from lemix_common.transports import Identity, open_transport

broker = connect(os.environ["LEMIX_TEST_URL"], "transports")
channel = open_transport(Identity("peer", b"a secret"), broker=broker).connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_killed_peer_is_missed(site: Site, server: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kill -9`` of a peer that says nothing anyway is `PeerLost` for who receives and for who sends."""
    monkeypatch.setenv("LEMIX_TEST_URL", server.url)
    listener = site.listen()
    with peer_process(PEER, listener.address) as process:
        channel = site.accept(listener)
        receiving = site.run(channel.receive)
        process.kill()
        process.wait()
        assert isinstance(receiving.exception(DEADLINE_S), PeerLost)
        with pytest.raises(PeerLost):
            channel.send(frame())


def test_a_broker_that_goes_away_ends_channels_and_no_listener(tmp_path: Path) -> None:
    """With the broker, all channels through it end; when it is back, the same listener has new ones."""
    server = start_broker(tmp_path)
    broker = connect(server.url, "transports")
    try:
        with site_of("redis", tmp_path, broker) as site:
            listener = site.listen()
            near, far = site.connect(listener.address), site.accept(listener)
            waiting = [site.run(end.receive) for end in (near, far)]
            server.process.kill()
            server.process.wait()
            for receiving in waiting:
                assert isinstance(receiving.exception(DEADLINE_S), PeerLost)
            server.restart()
            server.wait_ready()
            accepting = site.run(listener.accept)
            again = site.run(partial(connect_until_answered, site, listener.address)).result(DEADLINE_S)
            site.opened.append(accepting.result(DEADLINE_S))
            again.send(frame(1))
            assert accepting.result().receive().frame == frame(1)
    finally:
        broker.client.connection_pool.disconnect()
        server.stop()


def connect_until_answered(site: Site, address: str) -> Channel:
    """The door is opened again a moment after the broker is back."""
    while True:
        try:
            return site.connect(address)
        except PeerLost:
            continue


@pytest.mark.parametrize("number", [0, 10**6])
def test_a_message_that_was_lost_or_doubled_ends_the_channel(site: Site, number: int) -> None:
    """The broker promises no delivery; what is missing, or comes twice, shows in the count of bytes."""
    near, far = site.pair()
    near.send(frame(1))
    assert far.receive().frame == frame(1)
    connection = connection_of(near)
    connection._post.publish(connection._peer, b"D", number, b"from nowhere")
    with pytest.raises(PeerLost):
        far.receive()


@pytest.mark.parametrize(
    "letter", [b"", b"C", b"what is this?", b"C" + bytes(8) + b"../../etc", b"\xff" * 99]
)
def test_letters_of_strangers_are_thrown_away(site: Site, broker: Broker, letter: bytes) -> None:
    """Whatever is put into a door or a mailbox, listener and channels live on."""
    listener = site.listen()
    near, far = site.connect(listener.address), site.accept(listener)
    connection = connection_of(near)
    for mailbox in ("a", connection._mailbox, connection._peer):
        assert connection._post.client.publish(broker.keys.tensors(mailbox), letter) == 1
    near.send(frame(1))
    assert far.receive().frame == frame(1)
    site.connect(listener.address)
    site.accept(listener)


def test_a_caller_that_hangs_up_is_refused(site: Site, broker: Broker) -> None:
    """A call from a mailbox that nobody reads costs the listener nothing."""
    listener = site.listen()
    call = b"C" + bytes(8) + b"nobody:" + os.urandom(16).hex().encode()
    site.run(lambda: broker.client.publish(broker.keys.tensors("a"), call)).result(DEADLINE_S)
    with pytest.raises(PeerRefused, match="hello"):
        site.accept(listener)
    site.connect(listener.address)
    site.accept(listener)


def test_without_a_broker_there_are_no_such_addresses() -> None:
    """A transport that was given no broker says so."""
    with pytest.raises(SettingsError, match="broker"):
        open_transport(NEAR).connect("redis:a")


def test_a_broker_that_allows_no_publishing_is_named(server: RunningBroker, tmp_path: Path) -> None:
    """A user of the broker without rights to its channels can't listen there, and learns it at once."""
    admin = connect(server.url, "transports")
    admin.client.acl_setuser(
        "narrow", enabled=True, nopass=True, commands=["+@all"], keys=["*"], reset_channels=True
    )
    narrow = connect(server.url.replace("//:", "//narrow:"), "transports")
    try:
        with (
            site_of("redis", tmp_path, narrow) as site,
            pytest.raises(ClusterError, match="perm"),
        ):
            site.listen()
    finally:
        admin.client.acl_deluser("narrow")
        for broker in (admin, narrow):
            broker.client.connection_pool.disconnect()
