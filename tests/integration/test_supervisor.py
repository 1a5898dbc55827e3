"""`lemix up` as a process: it starts everything, brings back what dies, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from command_line import lemix
from lemix import Client
from lemix.data_dir import DataDir
from lemix.running import running_cluster
from lemix.supervisor import Launch, StopRequests, Supervisor
from lemix.weight_files import weight_files
from lemix_common.broker import connect
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.versions import Versions
from lemix_common.tensorfiles import weights_sha256
from tiny_model import write_tiny_llama

PATIENCE_S = 20.0
pytestmark = pytest.mark.timeout(90)  # importing torch takes a worker four seconds of a core


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ClusterSettings:
    """One node of one stage: the fewest processes that make a cluster."""
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return ClusterSettings(model=str(model), step_examples=2)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DataDir]:
    """A data directory without a process that lives on in it."""
    path = DataDir(tmp_path / "data")
    yield path
    assert not path.is_locked()
    assert not (path.path / "cluster.json").exists()


def test_what_dies_comes_back_and_down_leaves_nothing(settings: ClusterSettings, directory: DataDir) -> None:
    """SIGKILL of every child at once, the broker too, is repaired; an orderly end keeps what was learned."""
    with running_cluster(settings, data_dir=directory.path) as url, Client(url) as client:
        before = client.score("the cat sat", "on the mat", timeout=PATIENCE_S)
        for future in (client.train("the cat", "sat"), client.train("the dog", "ran")):
            future.result(PATIENCE_S)
        first = directory.announced().processes
        assert set(first) == {"broker", "coordinator", "operations", "worker-0"}
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not set(directory.announced().processes.values()) & set(first.values()),
            what="every process has a successor",
            timeout_s=PATIENCE_S,
        )
        after = client.score("the cat sat", "on the mat", timeout=PATIENCE_S)
        second = directory.announced().processes
    assert (before.weights_version, after.weights_version) == ("0.0", "0.1")
    assert not [name for name, pid in [*first.items(), *second.items()] if is_running(pid)]
    assert [path.name for path in directory.checkpoints.iterdir()] == ["0.1"], "the last checkpoint was taken"


def test_a_killed_supervisor_takes_everything_along(settings: ClusterSettings, directory: DataDir) -> None:
    """After SIGKILL of `lemix up` no process is left, and `--resume` goes on where it was."""
    with running_cluster(settings, data_dir=directory.path) as url:
        running = directory.announced()
        with Client(url) as client:
            for future in (client.train("the cat", "sat"), client.train("the dog", "ran")):
                future.result(PATIENCE_S)
        os.kill(running.pid, signal.SIGKILL)
        pids = [running.pid, *running.processes.values()]
        wait_until(lambda: not any(map(is_running, pids)), what="all have ended", timeout_s=PATIENCE_S)
    assert not directory.is_locked()
    with pytest.raises(BadInput, match="`lemix up --resume` goes on with it"), _up(settings, directory):
        pass
    with running_cluster(settings, data_dir=directory.path, resume=True) as url, Client(url) as client:
        assert client.score("the cat", "sat", timeout=PATIENCE_S).weights_version == "0.1"


def test_from_up_to_down_on_the_command_line(settings: ClusterSettings, directory: DataDir) -> None:
    """`up --detach` returns when ready; status, redis, checkpoint and export find the cluster; `down` ends it."""
    up = ("up", "--model", settings.model, "--step-examples", "2")
    assert "is ready at redis://127.0.0.1:" in lemix(directory, *up, "--detach").stdout
    try:
        assert "already" in lemix(directory, *up, status=2).stderr, "a directory has one cluster"
        status = json.loads(lemix(directory, "status", "--json").stdout)
        assert [stage["layers"] for node in status["nodes"] for stage in node["stages"]] == [[0, 1]]
        assert "coordinator-" in lemix(directory, "status").stdout
        assert lemix(directory, "redis", "HGET", "{lemix}:cluster", "state").stdout == "running\n"
        assert "unknown command" in lemix(directory, "redis", "NONSENSE", status=1).stderr
        assert "version 0.0" in lemix(directory, "checkpoint").stdout
        out = directory.path.parent / "out"
        assert lemix(directory, "export", str(out)).stdout == f"version 0.0 in {out}\n"
        assert weights_sha256(weight_files(out)) == weights_sha256(weight_files(Path(settings.model)))
        assert "is not empty" in lemix(directory, "export", str(out), status=2).stderr
    finally:
        assert lemix(directory, "down").stdout == "stopped\n"
    assert "no cluster runs in" in lemix(directory, "down", status=1).stderr


def test_a_model_that_no_worker_can_host_is_one_error(directory: DataDir) -> None:
    """What only a worker can see ends the start with its reason, and the next start is a first one again."""
    model = write_tiny_llama(directory.path.parent / "odd", hidden_size=20)
    with (
        pytest.raises(BadInput, match=r"worker-0 can't start: .* are of different models"),
        running_cluster(ClusterSettings(model=str(model)), data_dir=directory.path),
    ):
        pass
    assert not directory.has_state()
    assert not directory.broker.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/no/such/folder"], "no such folder"),
        (["--stages", "3"], "2 layers, which can't be cut into 3 stages"),
        (["--policy", "best"], "policy = best: must be one of"),
        (["--nodes", "0"], "nodes = 0: must be at least 1"),
        (["--config", "/no/such/file"], "can't be read as TOML"),
        (["--url", "redis://127.0.0.1:1/0"], "no Redis or Valkey answers"),
        (["--url", "http://127.0.0.1"], "not a broker's URL"),
        (["--url", "redis://127.0.0.1:1/0", "--port", "7"], "give either"),
    ],
)
def test_bad_input_starts_nothing(
    settings: ClusterSettings, directory: DataDir, options: list[str], sentence: str
) -> None:
    """One sentence on stderr, status 2 (1 for a broker that isn't there), and no process was started."""
    status = 1 if "--url" in options and "--port" not in options else 2
    command = ("up", "--model", settings.model, *options)
    ended = lemix(directory, *command, status=status)
    assert ended.stdout == ""
    assert sentence in " ".join(ended.stderr.split())
    assert len(ended.stderr.splitlines()) == 1
    assert not (directory.path / "logs").exists()


def test_a_second_request_skips_the_last_checkpoint(
    settings: ClusterSettings, directory: DataDir, server: RunningBroker
) -> None:
    """A checkpoint that doesn't come is waited for, but not by a user who presses Ctrl-C again."""
    broker, stop = connect(server.url, "alone", patience_s=0), StopRequests(count=1)
    Cluster(broker).create(settings, {}, "{}")
    broker.client.hset(broker.keys.run(MAIN_RUN), "committed", 1)
    again = threading.Timer(0.3, stop.note, (signal.SIGINT, None))
    again.start()
    Supervisor(Launch(settings=settings, directory=directory), broker, server.url, stop)._checkpoint()
    again.join()
    assert [fields["state"] for fields in Versions(broker).in_progress().values()] == ["requested"]
    assert Cluster(broker).state()["state"] == "stopping", "nothing new is accepted meanwhile"
    broker.client.flushall()
    broker.client.close()


@pytest.mark.slow
def test_clusters_share_a_given_broker(
    settings: ClusterSettings, directory: DataDir, server: RunningBroker
) -> None:
    """With `--url` no broker is started, and what runs beside it on the broker is left alone."""
    other = connect(server.url, "other")
    Cluster(other).create(ClusterSettings(model="x"), {}, "{}")
    with running_cluster(settings, data_dir=directory.path, url=server.url, cluster="mine"):
        assert set(directory.announced().processes) == {"coordinator", "operations", "worker-0"}
    assert Cluster(other).settings().model == "x"
    other.client.flushall()
    other.client.close()


def _up(settings: ClusterSettings, directory: DataDir) -> AbstractContextManager[str]:
    return running_cluster(settings, data_dir=directory.path)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or ") Z " not in status.read_text()  # a zombie waits for its parent only
