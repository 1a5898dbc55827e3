"""What this machine, or the container we are in, has to give; and what of it this process has taken."""

from __future__ import annotations

import os
import resource
import socket
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (_CGROUP / "memory.max", _CGROUP / "memory/memory.limit_in_bytes")
_USAGES = (_CGROUP / "memory.current", _CGROUP / "memory/memory.usage_in_bytes")
_STATISTICS = (_CGROUP / "memory.stat", _CGROUP / "memory/memory.stat")
_GIVEN_BACK = {"inactive_file", "active_file"}
"""Copies of files: the kernel drops them when somebody needs the memory."""
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")


def memory_limit_bytes() -> int:
    """The most that all processes here may have: the machine's memory, or the container's limit if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_numbers(_LIMITS)])


def memory_free_bytes() -> int:
    """What another process could still get."""
    limit, usage = _numbers(_LIMITS), _numbers(_USAGES)
    free = [_available_bytes()]
    if limit and usage:
        free.append(max(0, limit[0] - usage[0] + _reclaimable_bytes()))
    return min(free)


def resident_bytes() -> int:
    """The memory this process has now (where the system only knows its peak, that)."""
    try:
        pages = int(_STATM.read_text("ascii").split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now; port 0 asks for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):
            return False
    return True


def _available_bytes() -> int:
    try:
        lines = _MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return memory_limit_bytes()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _reclaimable_bytes() -> int:
    lines = [line for file in _STATISTICS if file.exists() for line in file.read_text("ascii").splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in _GIVEN_BACK)


def _numbers(files: tuple[Path, ...]) -> list[int]:
    """What the files that exist say; ``max`` means no limit."""
    texts = [file.read_text("ascii").strip() for file in files if file.exists()]
    return [int(text) for text in texts if text.isdigit()]
