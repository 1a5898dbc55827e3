"""Tensor messaging between workers: the seam (`base`), sockets, the in-memory twin, and pooled buffers."""

from lemix_common.transports.base import Channel, Delivery, Identity, Listener, Timeouts, Transport
from lemix_common.transports.by_address import open_transport
from lemix_common.transports.pool import BufferPool

__all__ = [
    "BufferPool",
    "Channel",
    "Delivery",
    "Identity",
    "Listener",
    "Timeouts",
    "Transport",
    "open_transport",
]
