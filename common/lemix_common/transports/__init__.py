"""Tensor messaging between workers: the seam (`base`) and what carries it, from memory to the broker.

============================  =============================================================================
`reach`                       which way a neighbour takes: a function of where both are and what both have
`memory`                      within a process: the twin, for tests
`sockets`                     on a host and between hosts
`shared_memory`, `slots`      on a host: large payloads lie in memory that both ends map
`redis_transport`             through the broker, where no other way leads
============================  =============================================================================
"""

from lemix_common.transports.base import Channel, Delivery, Identity, Listener, Timeouts, Transport
from lemix_common.transports.by_address import open_transport
from lemix_common.transports.pool import BufferPool
from lemix_common.transports.reach import (
    NOWHERE,
    Place,
    Reach,
    choose_transport,
    parse_reach,
    usable_addresses,
)

__all__ = [
    "NOWHERE",
    "BufferPool",
    "Channel",
    "Delivery",
    "Identity",
    "Listener",
    "Place",
    "Reach",
    "Timeouts",
    "Transport",
    "choose_transport",
    "open_transport",
    "parse_reach",
    "usable_addresses",
]
