"""What the parts of one simulation share: the clock, the events to come, what the policy knows, what has come of it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import TYPE_CHECKING, Any

from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_studies.simulator.cluster import Node
from lemix_studies.simulator.jobs import Job
from lemix_studies.simulator.scenario import Interval, Record, Scenario

if TYPE_CHECKING:  # the parts know the run
    from lemix_studies.simulator.generations import Generations
    from lemix_studies.simulator.placing import Placing
    from lemix_studies.simulator.scores import Scores
    from lemix_studies.simulator.stages import Stages
    from lemix_studies.simulator.trainings import Trainings

Handler = Callable[[Any, Any], None]


class Run:
    """One simulation; `engine` puts it together."""

    __slots__ = (
        "events",
        "generations",
        "intervals",
        "is_changed",
        "nodes",
        "now",
        "num_left",
        "num_stages",
        "placing",
        "profile",
        "records",
        "scenario",
        "scores",
        "sequence",
        "stages",
        "state",
        "tells",
        "trainings",
    )

    placing: Placing
    stages: Stages
    scores: Scores
    trainings: Trainings
    generations: Generations

    def __init__(self, scenario: Scenario, nodes: list[Node], now: float) -> None:
        self.scenario = scenario
        self.profile = scenario.profile
        self.num_stages = scenario.profile.num_stages
        self.nodes = nodes
        self.now = now
        self.events: list[tuple[float, int, Handler, Any, Any]] = []
        """A heap; events of one moment in the order in which they were caused."""
        self.sequence = 0
        self.state = ClusterState.idle(
            scenario.profile, scenario.nodes, now, training_gives_way=scenario.order == "urgency"
        )
        # A policy that looks at nothing but which nodes are open needn't be told of anything else.
        self.tells = bool(getattr(scenario.policy, "uses_state", True))
        self.is_changed = False
        """Something was measured, ended or opened: who was refused may be asked about again."""
        self.records: list[Record | None] = [None] * (len(scenario.requests) + len(scenario.training))
        self.num_left = len(self.records)
        self.intervals: list[Interval] = []

    def push(self, at: float, handler: Handler, subject: object = None, detail: object = None) -> None:
        """Let something happen later."""
        self.sequence += 1
        heappush(self.events, (at, self.sequence, handler, subject, detail))

    def forward_measured(self, job: Job, stage: int, began: float) -> None:
        """Tell of a forward that has ended now."""
        if self.tells:
            self.state = self.state.forward_measured(job.work.item, job.node, stage, began, self.now)
        self.is_changed = True

    def backward_measured(self, job: Job, stage: int, began: float) -> None:
        """Tell of a backward, and the optimizer's step, that have ended now."""
        if self.tells:
            self.state = self.state.backward_measured(job.work.item, job.node, stage, began, self.now)
        self.is_changed = True

    def forget(self, job: Job) -> None:
        """Tell the policy that an item has ended."""
        if self.tells:
            self.state = self.state.ended(job.work.item, job.node, self.now)
        self.is_changed = True

    def end(
        self,
        job: Job,
        first_token_at: float | None = None,
        gaps_s: tuple[float, ...] = (),
        *,
        is_known: bool = False,
    ) -> None:
        """An item has ended now; ``is_known``: the policy has been told."""
        work, now = job.work, self.now
        self.records[job.index] = Record(
            work.item,
            work.kind,
            work.arrived_at,
            job.placed_at,
            job.node,
            job.began_at,
            first_token_at,
            now,
            "done",
            gaps_s,
        )
        self.num_left -= 1
        if not is_known:
            self.forget(job)
        self.placing.ended(job)
