"""Measuring a model's profile in a process of its own, with a worker's libraries and environment."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lemix_common.children import last_reason, start_child, stop_children
from lemix_common.errors import BadInput, ClusterError

_NEEDED: Final = ("torch", "transformers")
_MODULE: Final = "lemix_stage_worker.profiling"
_BAD_INPUT_STATUS: Final = 2
_TICK_S: Final = 0.1
_STOP_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is to be measured."""

    model: Path
    """A model folder."""
    stages: int
    device: str = "cpu"
    dtype: str = ""
    is_quick: bool = False

    @property
    def file_name(self) -> str:
        """Of the profile, among others."""
        return f"{self.model.name}-{self.stages}-{self.device.replace(':', '-')}.json"

    @property
    def arguments(self) -> list[str]:
        """Of the process that measures."""
        given = {"model": self.model, "stages": self.stages, "device": self.device, "dtype": self.dtype}
        named = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        return [*named, *(["--quick"] if self.is_quick else [])]


def measure(
    measurement: Measurement, *, on_progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """What the measuring process found, as it wrote it; ``on_progress`` gets its log's newest line now and then.

    `BadInput` where the worker's libraries are missing, or where it refuses the model; `ClusterError` if it fails.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise BadInput(f"measuring needs {', '.join(missing)} on this machine: pip install 'lemix[worker]'")
    with tempfile.TemporaryDirectory(prefix="lemix-profile-") as folder:
        found, log = Path(folder, "found.json"), Path(folder, "profiling.log")
        command = [sys.executable, "-m", _MODULE, *measurement.arguments, "--out", str(found)]
        process = start_child(command, log_path=log)
        try:
            while process.poll() is None:
                on_progress(_last_line(log))
                time.sleep(_TICK_S)
        finally:
            stop_children([process], timeout_s=_STOP_TIMEOUT_S)
        if process.returncode:
            raise _error(process, log)
        result: dict[str, Any] = json.loads(found.read_text("utf-8"))
        return result


def progress_of(line: str) -> str:
    """What a line of the measuring process's log says to who waits."""
    try:
        said = json.loads(line)
        return f"stage {said['stage']}: {said['round']} of {said['rounds']} rounds"
    except (ValueError, KeyError, TypeError):
        return "loading"


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines()
    return lines[-1] if lines else ""


def _error(process: subprocess.Popen[bytes], log: Path) -> Exception:
    kind = BadInput if process.returncode == _BAD_INPUT_STATUS else ClusterError
    return kind(f"measuring failed: {last_reason(log) or f'status {process.returncode}'}")
