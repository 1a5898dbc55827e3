"""Every transport behind one: the scheme of an address says which."""

from __future__ import annotations

from lemix_common.broker import Broker
from lemix_common.errors import SettingsError
from lemix_common.transports.addresses import MemoryAddress, RedisAddress, parse_address
from lemix_common.transports.base import Channel, Identity, Listener, Timeouts, Transport
from lemix_common.transports.memory import MemoryTransport
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.redis_transport import RedisTransport
from lemix_common.transports.sockets import SocketTransport


class TransportByAddress:
    """What a worker uses: addresses of any scheme, and one pool for all its buffers."""

    def __init__(
        self, identity: Identity, timeouts: Timeouts, pool: BufferPool, broker: Broker | None
    ) -> None:
        self._memory = MemoryTransport(identity, timeouts, pool)
        self._sockets = SocketTransport(identity, timeouts, pool)
        self._redis = RedisTransport(identity, timeouts, pool, broker) if broker is not None else None

    def listen(self, address: str) -> Listener:
        """Listen there."""
        return self._for(address).listen(address)

    def connect(self, address: str) -> Channel:
        """The channel to who listens there."""
        return self._for(address).connect(address)

    def _for(self, address: str) -> Transport:
        match parse_address(address):
            case MemoryAddress():
                return self._memory
            case RedisAddress():
                if self._redis is None:
                    raise SettingsError(f"{address} is an address on a broker, and there is none here")
                return self._redis
            case _:
                return self._sockets


def open_transport(
    identity: Identity,
    *,
    timeouts: Timeouts | None = None,
    pool: BufferPool | None = None,
    broker: Broker | None = None,
) -> TransportByAddress:
    """A worker's transport, for its composition root; without a broker it has no ``redis:`` addresses."""
    return TransportByAddress(identity, timeouts or Timeouts(), pool or BufferPool(), broker)
