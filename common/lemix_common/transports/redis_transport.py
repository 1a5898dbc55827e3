"""Channels through the broker, for workers that can't reach each other: slow, and they say so."""

from __future__ import annotations

from functools import partial

import redis
import structlog

from lemix_common.broker import Broker
from lemix_common.errors import ClusterError, PeerLost, PeerUnreachable, SettingsError
from lemix_common.transports.addresses import RedisAddress, parse_address
from lemix_common.transports.base import Identity, Timeouts
from lemix_common.transports.broker_streams import BrokerConnection, Door, Post
from lemix_common.transports.handshake import greet_connector, greet_listener
from lemix_common.transports.listeners import ConnectionListener, Greet, greet
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.streams import SocketChannel, StreamWire

log = structlog.get_logger()


class RedisTransport:
    """Channels over the Pub/Sub of a cluster's broker; the same hello and the same frames as over a socket."""

    def __init__(self, identity: Identity, timeouts: Timeouts, pool: BufferPool, broker: Broker) -> None:
        self._identity = identity
        self._timeouts = timeouts
        self._pool = pool
        self._broker = broker

    def listen(self, address: str) -> ConnectionListener[BrokerConnection]:
        """Take the name."""
        name = _name(address)
        door = Door(self._post(), name, connect=partial(self._connection, name))
        try:
            door.open()
        except OSError as error:
            door.close()
            raise ClusterError(f"can't listen at {address}: {error}") from error
        listener: ConnectionListener[BrokerConnection] = ConnectionListener(
            door, address, meet=self._meet, forget=lambda: None
        )
        listener.start()
        return listener

    def connect(self, address: str) -> SocketChannel:
        """The channel to who listens there."""
        door = _name(address)
        connection = self._connection(door)
        try:
            connection.call(door, timeout_s=self._timeouts.hello_s)
        except ConnectionRefusedError as error:
            connection.close()
            raise PeerUnreachable(f"nobody answers at {address}: {error}") from error
        except OSError as error:
            connection.close()
            raise PeerLost(f"the peer went away before its hello was over ({error})") from error
        channel = self._channel(connection, greet_listener)
        log.warning(
            "slow_transport",
            peer=channel.peer,
            address=address,
            reason="tensors go through the broker: large ones take some fifty times longer than over a socket",
            instead="let both workers listen where the other can connect: --listen tcp:HOST:PORT",
        )
        return channel

    def _meet(self, connection: BrokerConnection) -> SocketChannel:
        try:
            connection.answer()
        except OSError as error:
            connection.close()
            raise PeerLost(f"the peer went away before its hello was over ({error})") from error
        return self._channel(connection, greet_connector)

    def _channel(self, connection: BrokerConnection, side: Greet) -> SocketChannel:
        peer = greet(self._identity, connection, side, timeout_s=self._timeouts.hello_s)
        return SocketChannel(connection, peer, StreamWire(connection, self._pool))

    def _connection(self, name: str, caller: str = "") -> BrokerConnection:
        return BrokerConnection(self._post(), name, send_timeout_s=self._timeouts.send_s, caller=caller)

    def _post(self) -> Post:
        """Mailboxes over connections of their own, which end with who has them."""
        pool = self._broker.client.connection_pool
        settings = pool.connection_kwargs | {"decode_responses": False}
        own = redis.ConnectionPool(connection_class=pool.connection_class, **settings)
        return Post(redis.Redis(connection_pool=own), self._broker.keys)


def _name(address: str) -> str:
    parsed = parse_address(address)
    if not isinstance(parsed, RedisAddress):
        raise SettingsError(f"{address} is no name on the broker")
    return parsed.name
