"""A real cluster as its operator sees it: metrics of every process, `lemix top`, `lemix doctor`, `lemix down`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from lemix import Client
from lemix.data_dir import NO_SUPERVISOR, DataDir, RunningCluster
from lemix.running import running_cluster, stop_cluster
from lemix_common.children import start_child
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, ClusterError
from lemix_common.metrics import METRICS
from lemix_common.settings import ClusterSettings
from lemix_common.transports.place import socket_folders
from tiny_model import write_tiny_llama

PATIENCE_S = 20.0
pytestmark = pytest.mark.timeout(90)  # importing torch takes a worker four seconds of a core


@dataclass(frozen=True)
class Running:
    """A cluster that has served one item."""

    directory: DataDir
    model: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One worker, of all kinds of processes one."""
    folder = tmp_path_factory.mktemp("cluster")
    model = write_tiny_llama(folder / "tiny")
    directory = DataDir(folder / "data")
    with running_cluster(ClusterSettings(model=str(model)), data_dir=directory.path) as url:
        with Client(url) as client:
            client.generate("the cat", max_new_tokens=4, ignore_eos=True, timeout=PATIENCE_S)
        yield Running(directory, model)
    left = {path.name for path in directory.path.iterdir()}
    assert left == {"broker", "lock", "logs", "settings.toml"}, "nothing but its state and its logs"


# ------------------------------------------------------------------------------------------------------- metrics


def test_every_process_shows_its_metrics(cluster: Running) -> None:
    """Every metric of the table is on the pages of those who show it, beside what the process itself takes."""
    pages = {role: read(page) for role, page in pages_by_role(cluster.directory).items()}
    shown_by = {
        "the leader": {"coordinator"},
        "every coordinator": {"coordinator"},
        "workers": {"worker"},
        "operations": {"operations"},
        "every process": {"coordinator", "operations", "worker"},
    }
    for metric in METRICS:
        showing = {role for role, families in pages.items() if metric.name.removesuffix("_total") in families}
        assert showing == shown_by[metric.shown_by], metric.name
    for families in pages.values():
        assert families["process_resident_memory_bytes"].samples[0].value > 1e6
        assert families["process_cpu_seconds"].samples[0].value > 0


def test_the_figures_are_the_clusters(cluster: Running) -> None:
    """One generation of four tokens: its item, its time, and a worker that computed it."""
    wait_until(lambda: busy_s(cluster, "decode") > 0, what="the worker's time is shown", timeout_s=PATIENCE_S)
    coordinator = read(pages_by_role(cluster.directory)["coordinator"])
    items = {s.labels["state"]: s.value for s in coordinator["lemix_items"].samples}
    assert items == {
        "submitted": 1,
        "done": 1,
        "failed": 0,
        "cancelled": 0,
        "refused": 0,
        "dead_lettered": 0,
    }
    assert coordinator["lemix_response_seconds"].samples[0].value > 0
    assert coordinator["lemix_coordinator_leading"].samples[0].value == 1
    assert {s.labels["state"]: s.value for s in coordinator["lemix_nodes"].samples}["ready"] == 1
    assert busy_s(cluster, "prefill") > 0
    assert busy_s(cluster, "optimizer") == 0


def test_prometheus_is_told_where_to_look(cluster: Running) -> None:
    """`lemix status` and the data directory's prometheus.json name the same pages."""
    listed = json.loads(lemix(cluster, "status", "--json").stdout)["metrics"]
    targets = {f"http://{target['targets'][0]}/metrics" for target in file_targets(cluster.directory)}
    assert targets == set(listed.values())
    assert len(targets) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(cluster: Running) -> None:
    """Prometheus's own linter warns of no name, unit or help text of ours."""
    for page in pages_by_role(cluster.directory).values():
        command = ["promtool", "check", "metrics"]
        ended = subprocess.run(
            command, input=fetch(page), capture_output=True, text=True, timeout=20, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_scrapes_it(cluster: Running, tmp_path: Path) -> None:
    """A real Prometheus finds every process by prometheus.json, scrapes it, and warns of nothing."""
    targets = cluster.directory.path / "prometheus.json"
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "lemix", "file_sd_configs": [{"files": [str(targets)]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    port, log = free_port(), tmp_path / "prometheus.log"
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = start_child(command, log_path=log)
    try:
        wait_until(lambda: query(port, "sum(up)") == "3", what="all three are up", timeout_s=PATIENCE_S)
        assert query(port, 'lemix_items_total{state="done"}') == "1"
        lines = log.read_text("utf-8").splitlines()
    finally:
        process.terminate()  # of which it warns too
        process.wait(PATIENCE_S)
    assert [line for line in lines if "level=warn" in line or "level=error" in line] == []


def test_a_metrics_port_that_is_taken_starts_nothing(cluster: Running, tmp_path: Path) -> None:
    """Where ports are fixed, `lemix up` says which one isn't free before it starts anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        command = ("up", "--model", str(cluster.model), "--data-dir", str(tmp_path / "other"))
        ended = lemix(cluster, *command, status=2, LEMIX_METRICS_PORT=str(taken - 1))
    assert f"port {taken} on 127.0.0.1 is taken" in ended.stderr


def busy_s(cluster: Running, kind: str) -> float:
    """The seconds that the worker has spent on a kind of work."""
    family = read(pages_by_role(cluster.directory)["worker"])["lemix_stage_busy_seconds"]
    return sum(sample.value for sample in family.samples if sample.labels["kind"] == kind)


def pages_by_role(directory: DataDir) -> dict[str, str]:
    """Where each process shows its metrics, once all three do."""
    wait_until(lambda: len(file_targets(directory)) == 3, what="three pages", timeout_s=PATIENCE_S)
    return {
        target["labels"]["process"].split("-")[0]: f"http://{target['targets'][0]}/metrics"
        for target in file_targets(directory)
    }


def file_targets(directory: DataDir) -> list[dict[str, Any]]:
    """What prometheus.json has now."""
    path = directory.path / "prometheus.json"
    return list(json.loads(path.read_text("utf-8"))) if path.exists() else []


def read(page: str) -> dict[str, Family]:
    """A page's families by name, as Prometheus's parser reads them."""
    return {family.name: family for family in text_string_to_metric_families(fetch(page))}


def fetch(page: str) -> str:
    """A page."""
    with urllib.request.urlopen(page, timeout=10) as answer:
        return str(answer.read().decode())


def query(port: int, expression: str) -> str | None:
    """The value of a Prometheus expression, if there is one."""
    try:
        answer = fetch(f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}")
    except OSError:
        return None  # it is still starting
    found = json.loads(answer)["data"]["result"]
    return str(found[0]["value"][1]) if found else None


def free_port() -> int:
    """One that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -------------------------------------------------------------------------------------------------- top and doctor


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_top_shows_the_cluster_until_a_key(cluster: Running, key: bytes) -> None:
    """In a terminal it draws frame after frame; q or Ctrl-C ends it, and the terminal is as it was."""
    with terminal(cluster, "top", "--interval", "0.1") as top:
        shown = top.read_until(b"epoch 1", times=2)
        assert b"worker-0-" in shown
        os.write(top.keyboard, key)
        top.drain()
        assert top.process.wait(PATIENCE_S) == 0
        assert top.is_as_before()


def test_top_once_prints_a_frame(cluster: Running) -> None:
    """Without a terminal one frame can be had."""
    shown = lemix(cluster, "top", "--once").stdout
    assert "cluster lemix, running" in shown
    assert "0 ready" in shown


def test_doctor_knows_the_cluster_that_runs(cluster: Running) -> None:
    """Nothing is wrong: the broker answers and is durable, the ports are the cluster's own."""
    found = json.loads(lemix(cluster, "doctor", "--json").stdout)
    lines = {finding["check"]: finding for finding in found}
    assert "keeps every write" in lines["broker"]["found"]
    assert "lemix down" in lines["data directory"]["to_do"]
    assert "wrong" not in {finding["verdict"] for finding in found}


def test_a_log_line_says_what_it_is_about(cluster: Running) -> None:
    """The end of an item is one JSON event with its item, node, stage and version; so is whatever else happens."""
    lines = [json.loads(line) for line in cluster.directory.log("worker-0").read_text("utf-8").splitlines()]
    (done,) = [line for line in lines if line["event"] == "item_done"]
    assert done["process"].startswith("worker-0-")
    assert len(done["item"]) == 32
    assert [done[name] for name in ("kind", "attempt", "node", "stage", "version", "tokens")] == [
        *("generate", 1, 0, 0, "0.0", 4)
    ]
    assert all({"event", "level", "process", "timestamp"} <= line.keys() for line in lines)


def test_doctor_fails_where_something_is_wrong(cluster: Running) -> None:
    """Exit status 1, and the line says what to do."""
    ended = lemix(cluster, "doctor", "--model", "/no/such/folder", status=1)
    assert [line for line in ended.stdout.splitlines() if line.startswith("wrong  model")]


@dataclass
class Terminal:
    """A process in a terminal of its own."""

    process: subprocess.Popen[bytes]
    keyboard: int
    before: list[object]
    shown: bytes = b""

    def read_until(self, wanted: bytes, *, times: int) -> bytes:
        """What was shown, once it has this often."""
        deadline = time.monotonic() + PATIENCE_S
        while self.shown.count(wanted) < times:
            assert time.monotonic() < deadline, self.shown
            self._read()
        return self.shown

    def drain(self) -> None:
        """Read on until the process has ended."""
        while self.process.poll() is None:
            self._read()

    def is_as_before(self) -> bool:
        """The terminal echoes and waits for lines again."""
        return termios.tcgetattr(self.keyboard) == self.before

    def _read(self) -> None:
        if select.select([self.keyboard], [], [], 0.1)[0]:
            self.shown += os.read(self.keyboard, 65536)


@contextmanager
def terminal(cluster: Running, *arguments: str) -> Iterator[Terminal]:
    """Run a command of ours in a terminal of 100 columns."""
    keyboard, screen = pty.openpty()
    before = termios.tcgetattr(keyboard)
    process = subprocess.Popen(
        [sys.executable, "-m", "lemix", *arguments],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=environment_of(cluster) | {"COLUMNS": "100", "LINES": "40", "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: take_terminal(screen),  # noqa: PLW1509 - so that Ctrl-C reaches it
    )
    try:
        yield Terminal(process, keyboard, before)
    finally:
        process.kill()
        process.wait()
        os.close(screen)
        os.close(keyboard)


def take_terminal(screen: int) -> None:
    """Make it the controlling terminal of this session."""
    fcntl.ioctl(screen, termios.TIOCSCTTY, 0)


# ------------------------------------------------------------------------------------------------------------ down


def test_down_stops_a_cluster_that_still_starts(cluster: Running, tmp_path: Path) -> None:
    """Before it is announced, its lock says who starts it; nothing is left, so the next start is a first one."""
    directory = DataDir(tmp_path / "data")
    process = begin(directory, cluster.model)
    assert stop_cluster(directory) == "stopped"
    assert process.wait(PATIENCE_S) == 0
    assert not directory.has_state()


def test_down_kills_what_does_not_stop(cluster: Running, tmp_path: Path) -> None:
    """A supervisor that hangs is killed after a while, and everything with it."""
    directory = DataDir(tmp_path / "data")
    process = begin(directory, cluster.model)
    os.kill(process.pid, signal.SIGSTOP)
    assert "killed" in stop_cluster(directory, patience_s=0.2)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert directory.owner() is None


def test_down_clears_what_a_killed_cluster_left(tmp_path: Path) -> None:
    """Clients no longer find what isn't there."""
    directory = DataDir(tmp_path)
    left = RunningCluster(url="redis://", cluster="lemix", data_dir="", pid=1, processes={})
    directory.announce(left)
    directory.show_metrics({"worker-0": "http://127.0.0.1:1/metrics"})
    sockets = socket_folders(tmp_path)
    for folder in sockets:
        folder.mkdir()
        (folder / "worker-0-aaaaaa.sock").touch()
    assert "cleared what was left" in stop_cluster(directory)
    assert list(tmp_path.iterdir()) == []
    assert not any(folder.exists() for folder in sockets)
    with pytest.raises(ClusterError, match="no cluster runs in"):
        stop_cluster(directory)


def test_down_leaves_what_others_started(tmp_path: Path) -> None:
    """A cluster of containers is stopped by what started them."""
    directory = DataDir(tmp_path)
    created = RunningCluster(url="redis://", cluster="lemix", data_dir="", pid=NO_SUPERVISOR, processes={})
    directory.announce(created)
    with pytest.raises(BadInput, match="docker compose down"):
        stop_cluster(directory)
    assert directory.announced() == created


def begin(directory: DataDir, model: Path) -> subprocess.Popen[bytes]:
    """`lemix up`, as far as its lock and its broker."""
    command = [sys.executable, "-m", "lemix", "up", "--model", str(model), "--data-dir", str(directory.path)]
    process = start_child(command, log_path=directory.path.parent / "up.log", environment=os.environ)
    wait_until(directory.has_state, what="the start has begun", timeout_s=PATIENCE_S)
    assert directory.owner() == process.pid
    return process


def lemix(
    cluster: Running, *arguments: str, status: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment that knows the data directory only."""
    ended = subprocess.run(
        [sys.executable, "-m", "lemix", *arguments],
        env=environment_of(cluster) | {"COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status, (ended.stdout, ended.stderr)
    return ended


def environment_of(cluster: Running) -> dict[str, str]:
    """Ours, with this cluster and no other."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
    return known | {"LEMIX_DATA_DIR": str(cluster.directory.path)}
