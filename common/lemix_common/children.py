"""Child processes that can't outlive their parent, and how to end them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lemix_common.errors import BadInput, ClusterError

_PR_SET_PDEATHSIG = 1
_LAST_BYTES = 8192


def start_child(
    command: Sequence[str],
    *,
    log_path: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    survives: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program whose output goes to the end of ``log_path`` and which dies with this process.

    Linux ends it when the *thread* that called this ends, so call it from one that lives as long as the child should.
    A terminal's Ctrl-C doesn't reach it: stopping it is its parent's decision. One that ``survives`` is on its own.
    """
    dies_with_us = sys.platform == "linux" and not survives
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                cwd=directory,
                start_new_session=True,
                preexec_fn=_dying_with(os.getpid()) if dies_with_us else None,  # noqa: PLW1509 - threads are none yet
            )
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]} can't be started: {error.strerror} ({error.filename})") from None
    except OSError as error:
        raise BadInput(
            f"{log_path}: can't be written ({error.strerror}); choose another --data-dir"
        ) from None


def stop_children(processes: Iterable[subprocess.Popen[bytes]], *, timeout_s: float) -> None:
    """Ask them all to end, once; kill those that haven't after ``timeout_s``."""
    ending = list(processes)
    for process in ending:
        process.terminate()
    deadline = time.monotonic() + timeout_s
    for process in ending:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_reason(log_path: Path) -> str:
    """Why a child ended, as far as the end of its log says: its last line, of a structured one the ``reason``."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = log.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    try:
        return str(json.loads(last)["reason"])
    except (ValueError, KeyError, TypeError):
        return last


def _dying_with(parent: int) -> Callable[[], None]:
    """What the child does before it becomes its program: ask the kernel to be killed when its parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec nothing may be imported

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
