"""Where a worker can be reached, as one string: ``unix:/path``, ``tcp:host:port`` or ``memory:name``."""

from __future__ import annotations

from dataclasses import dataclass

from lemix_common.errors import SettingsError


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


Address = UnixAddress | TcpAddress | MemoryAddress


def parse_address(text: str) -> Address:
    """Read an address; anything else is a `SettingsError`."""
    scheme, _, rest = text.partition(":")
    host, _, port = rest.rpartition(":")
    match scheme:
        case "unix" if rest:
            return UnixAddress(rest)
        case "tcp" if host and port.isdecimal() and int(port) < 2**16:
            return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
        case "memory" if rest:
            return MemoryAddress(rest)
        case _:
            raise SettingsError(f"{text!r} is no address (use unix:/path, tcp:host:port or memory:name)")
