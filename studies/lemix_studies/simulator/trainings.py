"""Training steps: microbatches forward and back in the order of a schedule, then the optimizer on all stages."""

from __future__ import annotations

from lemix_coordinator.scheduling.work import Work
from lemix_studies.simulator.cluster import (
    OPTIMIZER,
    TRAINING_BACKWARD,
    TRAINING_FORWARD,
    Node,
    Stage,
)
from lemix_studies.simulator.jobs import TrainingJob, microbatches_of, orders_of
from lemix_studies.simulator.run import Run


class Trainings:
    """All nodes' steps."""

    __slots__ = ("_is_asynchronous", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_asynchronous = run.scenario.release == "a-pp"

    def job(self, work: Work, index: int, node: Node) -> TrainingJob:
        """With its times on every stage."""
        run = self._run
        parts = microbatches_of(work.lengths, run.scenario.microbatches)
        orders = orders_of(run.scenario.schedule, run.num_stages, len(parts))
        job = TrainingJob(work, index, node.number, run.now, orders)
        stages, hop = run.profile.stages, run.profile.hop
        job.forward_MS = [
            [stage.forward_of(is_training=True).of(*part) for stage in stages] for part in parts
        ]
        job.backward_MS = [[stage.backward.of(*part) for stage in stages] for part in parts]
        job.hop_M = [hop.of(*part) for part in parts]
        return job

    def begin(self, node: Node, job: TrainingJob) -> None:
        """All microbatches are at stage 0."""
        for microbatch in range(len(job.forward_MS)):
            job.arrived_S[0].add((True, microbatch))
        self._follow(job, node.stages[0])

    def ended(self, stage: Stage, kind: int, job: TrainingJob, microbatch: int) -> None:
        """A pass, or the optimizer's step, on a stage."""
        if kind == TRAINING_FORWARD:
            self._forward_ended(stage, job, microbatch)
        elif kind == TRAINING_BACKWARD:
            self._backward_ended(stage, job, microbatch)
        else:
            self._stepped(stage, job)

    def _forward_ended(self, stage: Stage, job: TrainingJob, microbatch: int) -> None:
        run = self._run
        number = stage.number
        job.forwards_left_S[number] -= 1
        if not job.forwards_left_S[number]:
            run.forward_measured(job, number, job.forward_began_S[number])
            if not number and self._is_asynchronous:
                run.placing.release_next()
        if number + 1 == run.num_stages:
            job.arrived_S[number].add((False, microbatch))
            self._follow(job, stage)
        else:
            self._send(stage.node.stages[number + 1], job, (True, microbatch))

    def _backward_ended(self, stage: Stage, job: TrainingJob, microbatch: int) -> None:
        stage.last_backward = self._run.now
        if stage.number:
            self._send(stage.node.stages[stage.number - 1], job, (False, microbatch))
            return
        job.backwards_left -= 1
        if not job.backwards_left:  # the last gradient of all: every stage may change its weights
            for each in stage.node.stages:
                self._run.stages.enqueue(each, OPTIMIZER, job, 0, each.optimizer_s)

    def _stepped(self, stage: Stage, job: TrainingJob) -> None:
        run = self._run
        run.backward_measured(job, stage.number, job.backward_began_S[stage.number])
        job.steps_left -= 1
        if not job.steps_left:
            run.end(job)
            if not self._is_asynchronous:
                run.placing.release_next()

    def _send(self, stage: Stage, job: TrainingJob, step: tuple[bool, int]) -> None:
        self._run.push(self._run.now + job.hop_M[step[1]], self._arrived, stage, (job, step))

    def _arrived(self, stage: Stage, what: tuple[TrainingJob, tuple[bool, int]]) -> None:
        job, step = what
        job.arrived_S[stage.number].add(step)
        self._follow(job, stage)

    def _follow(self, job: TrainingJob, stage: Stage) -> None:
        """Let the stage have what comes next in the schedule's order, as far as it has arrived."""
        number = stage.number
        order, arrived = job.order_S[number], job.arrived_S[number]
        place = job.next_S[number]
        while place < len(order) and order[place] in arrived:
            is_forward, microbatch = order[place]
            place += 1
            job.next_S[number] = place
            if is_forward:
                kind, seconds = TRAINING_FORWARD, job.forward_MS[microbatch][number]
            else:
                kind, seconds = TRAINING_BACKWARD, job.backward_MS[microbatch][number]
            self._run.stages.enqueue(stage, kind, job, microbatch, seconds)
