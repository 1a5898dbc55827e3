"""Scores: one forward through the stages, a hop between."""

from __future__ import annotations

from heapq import heappush

from lemix_coordinator.scheduling.work import Work
from lemix_studies.simulator.cluster import FORWARD, Node, Stage
from lemix_studies.simulator.jobs import Job
from lemix_studies.simulator.run import Run


class Scores:
    """All nodes' scores."""

    __slots__ = ("_run",)

    def __init__(self, run: Run) -> None:
        self._run = run

    def job(self, work: Work, index: int, node: Node) -> Job:
        """With its times on every stage."""
        job = Job(work, index, node.number, self._run.now)
        lengths = work.lengths
        tokens = sum(lengths)
        contexts = sum([length * length for length in lengths])
        job.forward_S = [stage.costs.forward.of(tokens, contexts) for stage in node.stages]
        hop = self._run.profile.hop
        job.hop_s = hop.base + hop.token * tokens
        return job

    def begin(self, node: Node, job: Job) -> None:
        """At stage 0."""
        self._run.stages.enqueue(node.stages[0], FORWARD, job, 0, job.forward_S[0])

    def ended(self, stage: Stage, job: Job) -> None:
        """On a stage: on to the next one, or through."""
        run = self._run
        run.forward_measured(job, stage.number, stage.began)
        following = stage.number + 1
        if following == run.num_stages:
            run.end(job)
            return
        run.sequence += 1
        heappush(
            run.events,
            (run.now + job.hop_s, run.sequence, self._arrived, stage.node.stages[following], job),
        )

    def _arrived(self, stage: Stage, job: Job) -> None:
        self._run.stages.enqueue(stage, FORWARD, job, 0, job.forward_S[stage.number])
