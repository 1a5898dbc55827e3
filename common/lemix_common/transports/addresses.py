"""Where a worker can be reached, as one string: a scheme, which says how, and where.

``memory:name``  ``shm:/path``  ``unix:/path``  ``tcp:host:port``  ``redis:name``
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from lemix_common.errors import SettingsError

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class SharedMemoryAddress:
    """A socket file on this host, whose peers share memory."""

    path: str

    def __str__(self) -> str:
        return f"shm:{self.path}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file on this host."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A port of a host; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """A name in this process."""

    name: str

    def __str__(self) -> str:
        return f"memory:{self.name}"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A name on the cluster's broker."""

    name: str

    def __str__(self) -> str:
        return f"redis:{self.name}"


Address = MemoryAddress | SharedMemoryAddress | UnixAddress | TcpAddress | RedisAddress


def parse_address(text: str) -> Address:
    """Read an address; anything else is a `SettingsError`."""
    scheme, _, rest = text.partition(":")
    host, _, port = rest.rpartition(":")
    match scheme:
        case "memory" if rest:
            return MemoryAddress(rest)
        case "shm" if rest:
            return SharedMemoryAddress(rest)
        case "unix" if rest:
            return UnixAddress(rest)
        case "tcp" if host and port.isdecimal() and int(port) < 2**16:
            return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
        case "redis" if _NAME.fullmatch(rest):
            return RedisAddress(rest)
        case _:
            raise SettingsError(
                f"{text!r} is no address (use memory:name, shm:/path, unix:/path, tcp:host:port or redis:name)"
            )
