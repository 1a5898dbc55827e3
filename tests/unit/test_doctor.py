"""`lemix doctor`: each check says what it found and, where something is wrong, what to do."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lemix import doctor
from lemix.data_dir import DataDir, RunningCluster
from lemix.doctor import Finding, Questions
from lemix_common.settings import ClusterSettings
from tiny_model import write_tiny_llama

MIB, GIB = 2**20, 2**30


def test_a_machine_that_can_do_it(tmp_path: Path) -> None:
    """Every check has its line, and none is wrong here."""
    model = write_tiny_llama(tmp_path / "tiny")
    findings = doctor.examine(Questions(data_dir=tmp_path / "data", model=str(model)), {})
    assert [finding.check for finding in findings] == [
        *("python", "packages", "data directory", "disk", "broker"),
        *("ports", "shared memory", "memory", "model"),
    ]
    assert [finding for finding in findings if finding.verdict == "wrong"] == []
    assert not (tmp_path / "data").exists(), "a check changes nothing"


def test_a_line_says_what_to_do() -> None:
    """Verdict, check, what was found, what to do."""
    finding = Finding("disk", "wrong", "3 MiB free", "make room")
    assert str(finding) == "wrong  disk            3 MiB free: make room"
    assert json.loads(json.dumps(finding.to_fields()))["to_do"] == "make room"


def test_an_old_python() -> None:
    """3.11 is the oldest."""
    assert doctor.check_python((3, 10, 9)).verdict == "wrong"
    assert doctor.check_python((3, 11, 0)).verdict == "ok"


def test_a_missing_package() -> None:
    """The extra to install is named."""
    finding = doctor.check_packages(("json", "no_such_package"))
    assert finding.verdict == "wrong"
    assert finding.found == "no no_such_package"
    assert "lemix[all]" in finding.to_do


def test_room_on_the_disk(tmp_path: Path) -> None:
    """Too little for a broker is wrong; too little for a large model's checkpoints is worth knowing."""
    assert doctor.check_disk(tmp_path, 3 * MIB, 0).verdict == "wrong"
    assert doctor.check_disk(tmp_path, GIB, 5 * GIB).verdict == "note"
    assert doctor.check_disk(tmp_path, GIB, MIB).verdict == "ok"


def test_memory_for_the_workers() -> None:
    """Too little to serve is wrong, too little to train as well is worth knowing."""
    assert doctor.check_memory(300 * MIB, 0, 1).verdict == "wrong"
    assert doctor.check_memory(4 * GIB, 2 * GIB, 1).verdict == "wrong"
    assert doctor.check_memory(8 * GIB, 2 * GIB, 2).verdict == "note"
    assert doctor.check_memory(16 * GIB, 2 * GIB, 2).verdict == "ok"


def test_the_data_directory(tmp_path: Path) -> None:
    """A running cluster, one that can be resumed, and what a killed one left are told apart."""
    directory = DataDir(tmp_path / "data")
    assert doctor.check_data_dir(directory).verdict == "ok"
    with directory.locked():
        finding = doctor.check_data_dir(directory)
        assert (finding.verdict, "lemix down" in finding.to_do) == ("note", True)
    directory.announce(
        RunningCluster(url="redis://", cluster="lemix", data_dir="", pid=os.getpid(), processes={})
    )
    finding = doctor.check_data_dir(directory)
    assert (finding.verdict, "lemix down" in finding.to_do) == ("wrong", True)
    directory.withdraw()
    directory.remember(ClusterSettings(model="m"))
    finding = doctor.check_data_dir(directory)
    assert (finding.verdict, "--resume" in finding.to_do) == ("note", True)


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    """A file in its place."""
    (tmp_path / "file").touch()
    finding = doctor.check_data_dir(DataDir(tmp_path / "file"))
    assert (finding.verdict, finding.to_do) == ("wrong", "choose another --data-dir")


@pytest.mark.parametrize(
    ("configuration", "verdict", "sentence"),
    [
        (
            {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"},
            "ok",
            "keeps every write",
        ),
        ({"appendonly": "yes", "appendfsync": "everysec"}, "note", "last second"),
        ({"appendonly": "no", "appendfsync": "always"}, "wrong", "keeps nothing on disk"),
        ({"appendonly": "yes", "maxmemory-policy": "allkeys-lru"}, "wrong", "throws items away"),
        ({}, "note", "doesn't show its configuration"),
    ],
)
def test_what_a_broker_keeps(configuration: dict[str, str], verdict: str, sentence: str) -> None:
    """The first promise needs a broker that is durable and evicts nothing."""
    finding = doctor.check_durability("redis://somewhere", configuration)
    assert finding.verdict == verdict
    assert sentence in str(finding)


def test_no_broker_there(tmp_path: Path) -> None:
    """The address that doesn't answer is named."""
    finding = doctor.check_broker(DataDir(tmp_path), "redis://127.0.0.1:1/0", "lemix")
    assert finding.verdict == "wrong"
    assert "127.0.0.1:1" in str(finding)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_taken_ports(taken: int, tmp_path: Path) -> None:
    """The broker's, or one of those that the metrics pages would have, is named; a running cluster has its own."""
    wanted = Questions(data_dir=tmp_path, port=taken)
    (finding,) = doctor.check_ports(wanted, {}, is_running=False)
    assert (finding.verdict, str(taken) in finding.found) == ("wrong", True)
    metrics = {"LEMIX_METRICS_PORT": str(taken - 1)}
    (finding,) = doctor.check_ports(Questions(data_dir=tmp_path), metrics, is_running=False)
    assert (finding.verdict, str(taken) in finding.found) == ("wrong", True)
    (finding,) = doctor.check_ports(wanted, {}, is_running=True)
    assert finding.verdict == "ok"
    (finding,) = doctor.check_ports(wanted, {"LEMIX_METRICS_PORT": "x"}, is_running=False)
    assert (finding.verdict, "must be a port" in finding.found) == ("wrong", True)


def test_no_shared_memory() -> None:
    """It is slower without, and says so."""

    def refused() -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    finding = doctor.check_shared_memory(refused)
    assert (finding.verdict, "slower" in finding.to_do) == ("note", True)
    assert doctor.check_shared_memory(lambda: None).verdict == "ok"


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    """Its own sentence says what to do."""
    assert doctor.check_model("", 1)[1].verdict == "note"
    assert doctor.check_model(str(tmp_path / "none"), 1)[1].verdict == "wrong"
    model = write_tiny_llama(tmp_path / "tiny")
    assert doctor.check_model(str(model), 3)[1].verdict == "wrong"
    size, finding = doctor.check_model(str(model), 2)
    assert (finding.verdict, size) == ("ok", (model / "model.safetensors").stat().st_size)
