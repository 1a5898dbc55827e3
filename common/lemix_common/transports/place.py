"""Where this process is, and which addresses it had best listen at: what the system says, for the composition root."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import tempfile
import uuid
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from lemix_common.transports.reach import Place, is_loopback
from lemix_common.transports.slots import check_shared_memory

log = structlog.get_logger()

_PROCESS: Final = uuid.uuid4().hex[:12]
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACES: Final = Path("/proc/self/ns")
_NOT_IN_NAMES: Final = re.compile("[^A-Za-z0-9._-]")


def this_place() -> Place:
    """Where this process is."""
    boot = _boot()
    host = f"{boot}.{_namespace('mnt')}.{os.getuid()}"
    return Place(host=host, network=f"{boot}.{_namespace('net')}", process=_PROCESS)


def usual_addresses(name: str, folder: Path, broker_url: str) -> list[str]:
    """Where a worker listens unless it is told otherwise: for its host, for others if the broker is elsewhere.

    Where the broker is reached over a network, workers are taken to reach each other the same way: at the address that
    this host has there, and at no other. The broker itself is the last way.
    """
    addresses = [f"unix:{folder / name}.sock"]
    try:
        check_shared_memory()
    except OSError as error:
        log.warning("no_shared_memory", reason=str(error), instead="Unix sockets")
    else:
        addresses.insert(0, f"shm:{folder / name}.shm")
    if host := _host_towards(broker_url):
        addresses.append(f"tcp:[{host}]:0" if ":" in host else f"tcp:{host}:0")
    return [*addresses, f"redis:{_NOT_IN_NAMES.sub('_', name)[:128]}"]


def socket_folders(data_dir: Path) -> tuple[Path, Path]:
    """Where workers of a data directory keep their socket files: in it, or, if that is too long for them, in /tmp."""
    digest = hashlib.sha256(str(data_dir.absolute()).encode()).hexdigest()[:12]
    return data_dir.absolute() / "sockets", Path(tempfile.gettempdir()) / f"lemix-{digest}"


def _boot() -> str:
    """This run of this system."""
    try:
        return _BOOT.read_text("utf-8").strip()[:13]
    except OSError:  # no Linux
        return f"{uuid.getnode():x}"


def _namespace(kind: str) -> str:
    try:
        return (_NAMESPACES / kind).readlink().name.strip(f"{kind}:[]")
    except OSError:  # no Linux
        return "all"


def _host_towards(broker_url: str) -> str:
    """This host's address on the way to the broker; empty if the way is no network."""
    parts = urlsplit(broker_url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        return ""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            parts.hostname, parts.port or 6379, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: the system only looks up the way
            host = str(probe.getsockname()[0])
    except OSError:
        return ""
    return "" if is_loopback(host) else host
