"""How a worker can be reached, as it registers it, and which way a neighbour takes: functions of values.

A worker listens at several addresses; which of them lead to it depends on where its neighbour is. So a `Reach` says
both, in the one text that stands in the worker's hash::

    shm:/run/lemix/w0.shm unix:/run/lemix/w0.sock tcp:10.0.0.7:40123 redis:w0 host=5f… network=81… process=c0…

==========  ==================================================================
way         leads there, if
==========  ==================================================================
``memory``  both are one process
``shm``     both are on one host and see the same files, and both have such an
            address: neither lacks anonymous memory files
``unix``    both are on one host and see the same files
``tcp``     always; a loopback address within one network only
``redis``   both have such an address: they share a broker
==========  ==================================================================

The first that holds is taken, since it is the fastest; a network that separates two workers, which nobody can see
beforehand, shows when connecting, and then the next way is tried.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import quote, unquote

from lemix_common.errors import PeerUnreachable, SettingsError
from lemix_common.transports.addresses import (
    Address,
    MemoryAddress,
    RedisAddress,
    SharedMemoryAddress,
    TcpAddress,
    UnixAddress,
    parse_address,
)

_BEST_FIRST: Final = (MemoryAddress, SharedMemoryAddress, UnixAddress, TcpAddress, RedisAddress)
_UNQUOTED: Final = "/:[]@+,~"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is; two that have a part in common share what it names."""

    host: str = ""
    """A running system, its files as seen there, and a user who may open them."""
    network: str = ""
    """A loopback interface."""
    process: str = ""


NOWHERE: Final = Place()
"""Of a worker that says only its addresses: they are taken at their word."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A worker's addresses, and where it is."""

    addresses: tuple[str, ...] = ()
    place: Place = NOWHERE

    def __str__(self) -> str:
        place = [f"{name}={quote(value, safe='')}" for name, value in asdict(self.place).items() if value]
        return " ".join([*(quote(address, safe=_UNQUOTED) for address in self.addresses), *place])


def parse_reach(text: str) -> Reach:
    """Read what a worker registered; addresses that another release knows and this one doesn't are left out."""
    addresses: list[str] = []
    place: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals and name in Place.__dataclass_fields__:
            place[name] = unquote(value)
            continue
        with suppress(SettingsError):
            addresses.append(str(parse_address(unquote(word))))
    return Reach(tuple(addresses), Place(**place))


def choose_transport(mine: Reach, theirs: Reach) -> str:
    """The best address of theirs for who is reached as ``mine`` says; `PeerUnreachable` if none leads there."""
    return usable_addresses(mine, theirs)[0]


def usable_addresses(mine: Reach, theirs: Reach) -> tuple[str, ...]:
    """All addresses of theirs that may lead there, the best first; `PeerUnreachable` if none does."""
    parsed = [parse_address(address) for address in theirs.addresses]
    usable = [address for address in parsed if _leads_there(address, mine, theirs)]
    if not usable:
        raise PeerUnreachable(f"no way leads from {mine} to {theirs}")
    return tuple(str(address) for address in sorted(usable, key=lambda one: _BEST_FIRST.index(type(one))))


def _leads_there(address: Address, mine: Reach, theirs: Reach) -> bool:
    here, there = mine.place, theirs.place
    if there == NOWHERE:
        return True
    match address:
        case MemoryAddress():
            return here.process == there.process
        case SharedMemoryAddress():
            return here.host == there.host and _has(mine, SharedMemoryAddress)
        case UnixAddress():
            return here.host == there.host
        case TcpAddress(host=host):
            return here.network == there.network or not is_loopback(host)
        case RedisAddress():
            return _has(mine, RedisAddress)


def _has(reach: Reach, kind: type[Address]) -> bool:
    return any(isinstance(parse_address(address), kind) for address in reach.addresses)


def is_loopback(host: str) -> bool:
    """Whether only this host, or this container, reaches itself there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return False
