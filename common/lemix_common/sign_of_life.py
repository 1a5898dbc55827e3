"""A file whose age says how long ago a process was last well: what a container's health check looks at.

A process touches it from the loop that does its work, and only after the broker answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """Where to show it; without a path nowhere."""

    path: Path | None = None

    def show(self) -> None:
        """The process is well now."""
        if self.path is not None:
            self.path.touch()
