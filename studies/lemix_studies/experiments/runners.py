"""Where points are run: the seam between studies and a simulator, emulated accelerators, or real ones.

What `RUNNERS` names is imported where it is asked for: a function of the `Sources` that makes a `Runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol, cast

from lemix_common.errors import BadInput
from lemix_studies.experiments.settings import Point, Setting
from lemix_studies.experiments.workloads import Sources
from lemix_studies.recordings import Recording

RUNNERS: Final[Mapping[str, str]] = {
    "simulator": "lemix_studies.experiments.on_simulator:SimulatorRunner",
    "emulated": "lemix_studies.experiments.on_cluster:emulated",
    "real": "lemix_studies.experiments.on_cluster:real",
}
IN_PARALLEL: Final = frozenset({"simulator"})
"""Where points don't disturb each other's times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseUp:
    """What the stages of one run did, moment by moment."""

    recording: Recording
    held: tuple[tuple[int, float, float], ...]
    """Node, from, to: when it held weights; seconds on the recording's clock."""
    far: tuple[tuple[int, int, float, float], ...] = ()
    """Forwards that a backward went before: node, stage, from when the forward could have begun, when it began."""
    immediate: tuple[tuple[int, int, float], ...] = ()
    """Forwards that began the moment the stage before them was through: node, stage, when."""


class Runner(Protocol):
    """Runs points; each call is a run of its own."""

    def run(self, point: Point) -> Mapping[str, Any]:
        """The measures of a point, by the names that all reports use, with `nodes_used`: how many got work."""

    def close_up(self, point: Point) -> CloseUp | None:
        """The same run to look at, or None where none is recorded."""

    def saturation(self, setting: Setting) -> float | None:
        """Requests a second that the cluster could serve if it did nothing else; None where that isn't known."""


def runner_for(where: str, sources: Sources) -> Runner:
    """The runner of a name; `BadInput` where there is none."""
    if where not in RUNNERS:
        raise BadInput(f"--on {where}: use {', '.join(RUNNERS)}")
    module, _, factory = RUNNERS[where].partition(":")
    return cast("Runner", getattr(import_module(module), factory)(sources))
