"""`lemix doctor`: what a cluster needs of this machine, one check a line, and what to do where it isn't there.

A check looks and changes nothing. *wrong* means that `lemix up` (or the cluster that runs) can't keep its promises;
a *note* is worth knowing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from redis.exceptions import RedisError

from lemix.data_dir import NO_SUPERVISOR, DataDir
from lemix.model_folder import open_model_folder
from lemix.weight_files import weight_files
from lemix_common.broker import Broker, connect, hide_password
from lemix_common.errors import BrokerError, ClusterError, LemixError
from lemix_common.machine import is_free, memory_free_bytes
from lemix_common.metrics import PORT_VARIABLE, THIS_MACHINE, metrics_address
from lemix_common.server import LEAST_FREE_BYTES, find_server
from lemix_common.transports import slots

OLDEST_PYTHON: Final = (3, 11)
NEEDED: Final = ("torch", "transformers", "celery", "prometheus_client")
WORKER_BYTES: Final = 400 * 2**20
"""What a worker takes before it has weights: torch and transformers."""
SERVED_COPIES, TRAINED_COPIES = 2, 4
"""Sizes of the model in memory: a version beside the next one; and weights, gradients and two moments."""
STORED_COPIES: Final = 12
"""On disk: three versions, three checkpoints with their moments."""
Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    verdict: Verdict
    found: str
    to_do: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<5}  {self.check:<14}  {self.found}" + (
            f": {self.to_do}" if self.to_do else ""
        )

    def to_fields(self) -> dict[str, str]:
        """As JSON shows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is wanted of this machine."""

    data_dir: Path
    url: str = ""
    cluster: str = "lemix"
    port: int = 0
    model: str = ""
    stages: int = 1
    workers: int = 1


def examine(wanted: Questions, environment: Mapping[str, str]) -> list[Finding]:
    """Every check, in the order in which `lemix up` would stumble."""
    weights_bytes, about_model = check_model(wanted.model, wanted.stages)
    directory = DataDir(wanted.data_dir)
    return [
        check_python(sys.version_info[:3]),
        check_packages(),
        check_data_dir(directory),
        check_disk(directory.path, _free_bytes(directory.path), weights_bytes),
        check_broker(directory, wanted.url, wanted.cluster),
        *check_ports(wanted, environment, is_running=directory.is_locked()),
        check_shared_memory(),
        check_memory(memory_free_bytes(), weights_bytes, wanted.workers),
        about_model,
    ]


def check_python(running: tuple[int, ...]) -> Finding:
    """New enough."""
    found = ".".join(map(str, running))
    if running < OLDEST_PYTHON:
        return Finding("python", "wrong", found, "install Python 3.11 or newer")
    return Finding("python", "ok", found)


def check_packages(needed: tuple[str, ...] = NEEDED) -> Finding:
    """Everything that the services import is installed."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", "wrong", f"no {', no '.join(missing)}", "pip install 'lemix[all]'")
    return Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in needed))


def check_data_dir(directory: DataDir) -> Finding:
    """It can be written, and no cluster is in the way."""
    path = directory.path
    where = _existing(path)
    if not os.access(where, os.W_OK | os.X_OK) or not where.is_dir():
        return Finding("data directory", "wrong", f"{where} can't be written", "choose another --data-dir")
    if directory.is_locked():
        to_do = "`lemix status` shows it, `lemix down` stops it"
        return Finding("data directory", "note", f"a cluster runs in {path}", to_do)
    if _is_left(directory):
        return Finding(
            "data directory", "wrong", f"{path} has what a killed cluster left", "`lemix down` clears it"
        )
    if directory.has_state():
        to_do = "`lemix up --resume` goes on with it, another --data-dir starts afresh"
        return Finding("data directory", "note", f"{path} holds a cluster's state", to_do)
    return Finding("data directory", "ok", f"{path} can be used")


def check_disk(path: Path, free_bytes: int, weights_bytes: int) -> Finding:
    """Room for the broker's data, and for versions and checkpoints of the model."""
    found = f"{_size(free_bytes)} free for {path}"
    if free_bytes < LEAST_FREE_BYTES:
        to_do = f"a broker needs {_size(LEAST_FREE_BYTES)}: make room or choose another --data-dir"
        return Finding("disk", "wrong", found, to_do)
    if free_bytes < STORED_COPIES * weights_bytes:
        to_do = f"versions and checkpoints of this model may take {_size(STORED_COPIES * weights_bytes)}"
        return Finding("disk", "note", found, to_do)
    return Finding("disk", "ok", found)


def check_broker(directory: DataDir, url: str, cluster: str) -> Finding:
    """The one that runs answers and keeps what it accepts; or one can be started."""
    try:
        announced = directory.announced()
        url, cluster = announced.url, announced.cluster
    except ClusterError:
        pass  # none runs here
    try:
        if not url:
            return Finding("broker", "ok", f"`lemix up` would start {find_server()}")
        broker = connect(url, cluster, patience_s=0)
        try:
            return check_durability(hide_password(url), _configuration(broker))
        finally:
            broker.client.close()
    except BrokerError as error:
        found, _, to_do = str(error).rpartition(": ")
        return Finding("broker", "wrong", found or str(error), to_do if found else "")


def check_durability(where: str, configuration: Mapping[str, str]) -> Finding:
    """What its configuration says about keeping items; empty where it may not be read."""
    if not configuration:
        to_do = "make sure that it runs with appendonly yes, appendfsync always, maxmemory-policy noeviction"
        return Finding("broker", "note", f"{where} doesn't show its configuration", to_do)
    if configuration.get("appendonly") != "yes":
        to_do = "accepted items would be lost with it; configure appendonly yes, appendfsync always"
        return Finding("broker", "wrong", f"{where} keeps nothing on disk", to_do)
    policy = configuration.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        to_do = "configure maxmemory-policy noeviction"
        return Finding("broker", "wrong", f"{where} throws items away when it is full ({policy})", to_do)
    if configuration.get("appendfsync") != "always":
        to_do = "a power cut may lose the last second (see docs/guarantees.md); configure appendfsync always"
        return Finding("broker", "note", f"{where} has appendfsync {configuration.get('appendfsync')}", to_do)
    return Finding("broker", "ok", f"{where} answers and keeps every write (appendfsync always)")


def check_ports(wanted: Questions, environment: Mapping[str, str], *, is_running: bool) -> Iterator[Finding]:
    """The ports that were asked for are free; any free ones are, where none was."""
    try:
        first = metrics_address(environment).port
    except LemixError as error:
        yield Finding("ports", "wrong", str(error))
        return
    if is_running:
        yield Finding("ports", "ok", "taken by the cluster that runs")
        return
    asked = [wanted.port] if wanted.port else []
    asked += range(first, first + 2 + wanted.workers) if first else []
    taken = [port for port in asked or [0] if not is_free(THIS_MACHINE, port)]
    if taken:
        to_do = f"choose another --port or {PORT_VARIABLE}, or leave them out"
        yield Finding("ports", "wrong", f"{', '.join(map(str, taken))} taken on {THIS_MACHINE}", to_do)
    else:
        yield Finding("ports", "ok", f"{', '.join(map(str, asked)) or 'any'} free on {THIS_MACHINE}")


def check_shared_memory(attempt: Callable[[], None] = slots.check_shared_memory) -> Finding:
    """Workers of one machine pass large tensors through memory without a name; /dev/shm may be as small as it is."""
    try:
        attempt()
    except OSError as error:
        slower = "tensors between workers of this machine go through sockets, which is slower"
        return Finding("shared memory", "note", f"it can't be had ({error.strerror or error})", slower)
    return Finding("shared memory", "ok", "workers of this machine can share it")


def check_memory(free_bytes: int, weights_bytes: int, workers: int) -> Finding:
    """Room for the workers and one replica of the model; more if it is trained too."""
    found = f"{_size(free_bytes)} free"
    to_serve = workers * WORKER_BYTES + SERVED_COPIES * weights_bytes
    to_train = to_serve + TRAINED_COPIES * weights_bytes
    if free_bytes < to_serve:
        to_do = f"{workers} workers need {_size(to_serve)} to serve: fewer workers, or a smaller model"
        return Finding("memory", "wrong", found, to_do)
    if free_bytes < to_train:
        return Finding("memory", "note", found, f"enough to serve; to train too takes {_size(to_train)}")
    return Finding("memory", "ok", found)


def check_model(model: str, stages: int) -> tuple[int, Finding]:
    """The size of a model's weights, and whether it can be cut and served."""
    if not model:
        return 0, Finding("model", "note", "none given", "add --model DIR to have it checked")
    try:
        folder = open_model_folder(model, stages=stages)
        size = sum(file.stat().st_size for file in weight_files(folder.path))
    except LemixError as error:
        return 0, Finding("model", "wrong", str(error))
    found = f"{folder.path}: {folder.family}, {folder.num_layers} layers, {_size(size)}"
    return size, Finding("model", "ok", found)


def _is_left(directory: DataDir) -> bool:
    """A supervisor announced a cluster here and is gone."""
    try:
        return directory.announced().pid != NO_SUPERVISOR
    except ClusterError:
        return False


def _configuration(broker: Broker) -> dict[str, str]:
    try:
        names: Any = broker.client.config_get("appendonly", "appendfsync", "maxmemory-policy")
    except RedisError:
        return {}
    return dict(names)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _size(num_bytes: int) -> str:
    gibibytes = num_bytes / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{num_bytes / 2**20:.0f} MiB"
