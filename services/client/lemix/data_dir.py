"""A cluster's directory on disk: who owns it, where clients find the cluster, what a later start goes on from.

::

    DIR/lock            held by the supervisor while it lives
    DIR/cluster.json    where the running cluster is; there only while it runs
    DIR/prometheus.json where its processes show their metrics, as Prometheus's file_sd_configs reads it
    DIR/settings.toml   the settings it was started with; its presence means that the directory holds a cluster's state
    DIR/broker/         the broker's data
    DIR/checkpoints/    DIR/versions/    weights
    DIR/logs/NAME.log   what each process said
    DIR/sockets/        where its workers listen, if a socket's path may be that long
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lemix_common.errors import BadInput, ClusterError
from lemix_common.settings import ClusterSettings
from lemix_common.transports.place import socket_folders

NO_SUPERVISOR = 0
"""In place of its pid, where others start and stop the cluster's processes (see `lemix create`)."""
_LARGEST_LOG_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What cluster.json says."""

    url: str
    cluster: str
    data_dir: str
    pid: int
    """The supervisor's, or `NO_SUPERVISOR`."""
    processes: Mapping[str, int]
    """Pid by name: broker (if it is ours), coordinator, operations, worker-0 …"""


@dataclass(frozen=True, slots=True)
class DataDir:
    """The paths and records of one directory."""

    path: Path

    @property
    def broker(self) -> Path:
        return self.path / "broker"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def settings(self) -> Path:
        return self.path / "settings.toml"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    # ---- ownership
    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the directory; `BadInput` if a living supervisor does, or if it can't be written."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a")
        except OSError as error:
            raise BadInput(
                f"{self.path}: can't be written ({error.strerror}): choose another --data-dir"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.owned_by_another() from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def is_locked(self) -> bool:
        """Whether a supervisor lives in this directory."""
        try:
            with (self.path / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def owner(self) -> int | None:
        """Pid of the supervisor that lives in this directory, even while it still starts."""
        if not self.is_locked():
            return None
        text = (self.path / "lock").read_text("ascii")
        return int(text) if text.isdigit() else self.announced().pid

    def owned_by_another(self) -> BadInput:
        """The error of a second supervisor."""
        return BadInput(
            f"a cluster runs in {self.path} already: `lemix down` stops it, another --data-dir starts a second"
        )

    # ---- the running cluster
    def announce(self, running: RunningCluster) -> None:
        """Tell clients where the cluster is; only the owner can read it, since the URL has the broker's password."""
        self._write(self.path / "cluster.json", json.dumps(asdict(running), indent=1))

    def announced(self) -> RunningCluster:
        """Where the cluster is; `ClusterError` if none runs here."""
        try:
            return RunningCluster(**json.loads((self.path / "cluster.json").read_text("utf-8")))
        except FileNotFoundError:
            raise ClusterError(f"no cluster runs in {self.path}: start one with `lemix up`") from None
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"{self.path / 'cluster.json'} can't be read ({error})") from None

    def says(self, running: RunningCluster) -> bool:
        """Whether this is what clients are told already."""
        try:
            return self.announced() == running
        except ClusterError:
            return False

    def show_metrics(self, pages: Mapping[str, str]) -> None:
        """Tell a Prometheus of this machine where to look (each page is ``http://HOST:PORT/metrics``)."""
        targets = [
            {"targets": [url.split("/")[2]], "labels": {"process": process}} for process, url in pages.items()
        ]
        path, text = self.path / "prometheus.json", json.dumps(targets, indent=1)
        if not path.exists() or path.read_text("utf-8") != text:
            self._write(path, text)

    def withdraw(self) -> None:
        """The cluster runs no more."""
        (self.path / "cluster.json").unlink(missing_ok=True)
        (self.path / "prometheus.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a cluster that ended, however it did, may have left beside its state and its logs."""
        self.withdraw()
        for folder in socket_folders(self.path):
            shutil.rmtree(folder, ignore_errors=True)

    # ---- the state that a resume goes on from
    def has_state(self) -> bool:
        return self.settings.exists()

    def remember(self, settings: ClusterSettings) -> None:
        """Keep the settings for `lemix up --resume`; from now on the directory holds a cluster's state."""
        lines = (
            f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(settings).items()
        )
        self._write(self.settings, "\n".join(lines) + "\n")

    def forget(self) -> None:
        """Remove what a start that never got ready has made; its logs stay."""
        self.settings.unlink(missing_ok=True)
        shutil.rmtree(self.broker, ignore_errors=True)

    def bound_logs(self) -> None:
        """Keep each log small: what is over the limit becomes NAME.log.1, in place of an older one."""
        for log in self.path.glob("logs/*.log"):
            if log.stat().st_size > _LARGEST_LOG_BYTES:
                shutil.copyfile(log, log.with_suffix(".log.1"))
                os.truncate(log, 0)  # its writer appends, so it goes on from the start

    def _write(self, path: Path, text: str) -> None:
        fresh = path.with_name(f".{path.name}")
        fresh.unlink(missing_ok=True)
        with open(
            fresh, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)
        ) as file:
            file.write(text)
        fresh.replace(path)
