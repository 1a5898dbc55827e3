"""Every transport behind one: the scheme of an address says which."""

from __future__ import annotations

from lemix_common.transports.addresses import MemoryAddress, parse_address
from lemix_common.transports.base import Channel, Identity, Listener, Timeouts, Transport
from lemix_common.transports.memory import MemoryTransport
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.sockets import SocketTransport


class TransportByAddress:
    """What a worker uses: addresses of any scheme, and one pool for all its buffers."""

    def __init__(self, identity: Identity, timeouts: Timeouts, pool: BufferPool) -> None:
        self._memory = MemoryTransport(identity, timeouts, pool)
        self._sockets = SocketTransport(identity, timeouts, pool)

    def listen(self, address: str) -> Listener:
        """Listen there."""
        return self._for(address).listen(address)

    def connect(self, address: str) -> Channel:
        """The channel to who listens there."""
        return self._for(address).connect(address)

    def _for(self, address: str) -> Transport:
        return self._memory if isinstance(parse_address(address), MemoryAddress) else self._sockets


def open_transport(
    identity: Identity, *, timeouts: Timeouts | None = None, pool: BufferPool | None = None
) -> TransportByAddress:
    """A worker's transport, for its composition root."""
    return TransportByAddress(identity, timeouts or Timeouts(), pool or BufferPool())
