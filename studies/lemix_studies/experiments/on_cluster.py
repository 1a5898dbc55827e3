"""Points on clusters that run (see `live`), each started for its point and stopped behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lemix_studies.experiments.live import On, run_live
from lemix_studies.experiments.settings import Point, Setting
from lemix_studies.experiments.workloads import Sources


@dataclass(frozen=True, slots=True)
class ClusterRunner:
    """Runs points in their own time; what a study keeps of one is its measures."""

    on: On
    sources: Sources

    def run(self, point: Point) -> Mapping[str, Any]:
        """See `Runner`."""
        measures = run_live(point, on=self.on, model=self.sources.model_folder, sources=self.sources)
        return measures | {"nodes_used": measures["active_nodes"]}

    def close_up(self, point: Point) -> None:
        """None: `lemix timeline` draws running clusters."""
        del point

    def saturation(self, setting: Setting) -> None:
        """Nobody knows before."""
        del setting


def emulated(sources: Sources) -> ClusterRunner:
    """See `runners`."""
    return ClusterRunner("emulated", sources)


def real(sources: Sources) -> ClusterRunner:
    """See `runners`."""
    return ClusterRunner("real", sources)
