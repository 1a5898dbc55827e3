"""The seam between the coordinator and the operations workers: ask for a transition, don't wait for it."""

from __future__ import annotations

from typing import Protocol


class Transitions(Protocol):
    """Asks an operations worker; the asking may get lost, and is repeated by the reconciler."""

    def advance(self, operation: str) -> None:
        """Make the operation's next transition."""

    def remove(self, version: str, directory: str) -> None:
        """Remove the files of a version nobody uses."""
