"""`lemix up` from a program: start it as a process of its own, wait until it serves, stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from lemix.data_dir import NO_SUPERVISOR, DataDir
from lemix.supervisor import BAD_INPUT_STATUS, STOP_TIMEOUT_S, Launch
from lemix_common.children import last_reason, start_child
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, ClusterError, LemixError, WaitTimeout
from lemix_common.settings import ClusterSettings
from lemix_common.store.closing import CHECKPOINT_TIMEOUT_S

START_TIMEOUT_S = 300.0
_END_TIMEOUT_S = CHECKPOINT_TIMEOUT_S + 3 * STOP_TIMEOUT_S


@contextmanager
def running_cluster(
    settings: ClusterSettings,
    *,
    data_dir: Path,
    cluster: str = "lemix",
    url: str = "",
    resume: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A cluster for the length of a ``with`` block, yielded as its broker's URL; it dies with this process too."""
    launch = Launch(
        settings=settings, directory=DataDir(data_dir.absolute()), cluster=cluster, url=url, resume=resume
    )
    process = _start(launch, environment=environment, survives=False)
    try:
        yield _wait_ready(process, launch.directory)
    finally:
        _end(process)


def start_detached(launch: Launch) -> str:
    """Start a cluster that outlives this program, and return its URL when it serves."""
    process = _start(launch, environment=None, survives=True)
    try:
        return _wait_ready(process, launch.directory)
    except BaseException:
        _end(process)
        raise


def stop_cluster(directory: DataDir, *, patience_s: float = _END_TIMEOUT_S) -> str:
    """Have the supervisor of this directory stop its cluster, even while it starts, and say what was done.

    One that doesn't stop is killed, and what a killed one left is cleared away. `ClusterError` if there is nothing.
    """
    owner = directory.owner()
    if owner is None or (directory.path / "cluster.json").exists():
        running = directory.announced()
        if running.pid == NO_SUPERVISOR:
            raise BadInput(
                f"the cluster of {directory.path} was not started by `lemix up`: stop its processes with what started "
                "them (`docker compose down` in containers)"
            )
    if owner is None:
        directory.clear()
        return "its supervisor had been killed, and everything with it: cleared what was left"
    with suppress(ProcessLookupError):  # it ends by itself just now
        os.kill(owner, signal.SIGTERM)
    try:
        _wait_unlocked(directory, patience_s)
    except WaitTimeout:
        with suppress(ProcessLookupError):
            os.kill(owner, signal.SIGKILL)  # which takes its children along
        _wait_unlocked(directory, STOP_TIMEOUT_S)
        directory.clear()
        return f"killed, since it didn't stop within {patience_s:g} s: `lemix up --resume` goes on with it"
    return "stopped"


def _wait_unlocked(directory: DataDir, timeout_s: float) -> None:
    wait_until(
        lambda: not directory.is_locked(), what="the cluster stops", timeout_s=timeout_s, interval_s=0.1
    )


def _start(
    launch: Launch, *, environment: Mapping[str, str] | None, survives: bool
) -> subprocess.Popen[bytes]:
    return start_child(
        [sys.executable, "-m", "lemix", "up", *up_arguments(launch)],
        log_path=launch.directory.log("supervisor"),
        environment=os.environ | (environment or {}),
        survives=survives,
    )


def up_arguments(launch: Launch) -> list[str]:
    """What `lemix up` is told: everything, so that neither a file nor the environment has a say."""
    options = {
        **asdict(launch.settings),
        "data_dir": launch.directory.path,
        "cluster": launch.cluster,
        "url": launch.url,
        "port": launch.port,
    }
    arguments = ["--resume"] if launch.resume else []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


def _wait_ready(process: subprocess.Popen[bytes], directory: DataDir) -> str:
    urls: list[str] = []

    def is_ready() -> bool:
        if (status := process.poll()) is not None:
            raise _why_it_ended(status, directory)
        try:
            running = directory.announced()
        except ClusterError:
            return False
        urls.extend([running.url] if running.pid == process.pid else [])
        return bool(urls)

    wait_until(is_ready, what="the cluster becomes ready", timeout_s=START_TIMEOUT_S, interval_s=0.05)
    return urls[0]


def _why_it_ended(status: int, directory: DataDir) -> LemixError:
    if status == 0:
        return ClusterError("the cluster was asked to stop while it started")
    reason = last_reason(directory.log("supervisor")).removeprefix("lemix: ")
    return BadInput(reason) if status == BAD_INPUT_STATUS else ClusterError(reason)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise WaitTimeout(f"the cluster didn't stop within {_END_TIMEOUT_S:g} s and was killed") from None
