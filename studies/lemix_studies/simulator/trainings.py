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

    __slots__ = ("_as_worker", "_committed", "_current", "_is_asynchronous", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_asynchronous = run.scenario.release == "a-pp"
        self._as_worker = run.scenario.is_as_workers
        self._committed = 0
        """Steps, as a worker."""
        self._current: TrainingJob | None = None

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
        self._current, job.steps_before = job, self._committed
        for microbatch in range(len(job.forward_MS)):
            job.arrived_S[0].add((True, microbatch))
        self._follow(job, node.stages[0])

    def ended(self, stage: Stage, kind: int, job: TrainingJob, microbatch: int) -> None:
        """A pass, or the optimizer's step, on a stage."""
        job.given_S[stage.number] = False
        if kind == TRAINING_FORWARD:
            self._forward_ended(stage, job, microbatch)
        elif kind == TRAINING_BACKWARD:
            self._backward_ended(stage, job, microbatch)
        else:
            self._stepped(stage, job)
            return
        if self._as_worker:
            self._follow(job, stage)

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
            if self._as_worker:
                self._commit(job)
                return
            for each in stage.node.stages:
                self._run.stages.enqueue(each, OPTIMIZER, job, 0, each.optimizer_s)

    def _commit(self, job: TrainingJob) -> None:
        """Every stage of every node is a step further, when its worker comes to it; the next one may come already.

        For the policy a step ends here.
        """
        run = self._run
        for number, began in enumerate(job.backward_began_S):
            run.backward_measured(job, number, began)
        run.forget(job)
        self._committed += 1
        for node in run.nodes:
            for stage in node.stages:
                run.stages.deliver(stage, self._step, stage, job)
        run.placing.release_next()

    def _step(self, stage: Stage, job: TrainingJob) -> None:
        if stage.node.number == job.node:
            self._run.stages.enqueue(stage, OPTIMIZER, job, 0, stage.optimizer_s)
        elif stage.is_busy:  # there is nothing to learn, but its turn has to come
            self._run.stages.enqueue(stage, OPTIMIZER, job, 0, 0.0)
        else:
            self._stepped(stage, job)

    def _stepped(self, stage: Stage, job: TrainingJob) -> None:
        run = self._run
        stage.steps_done += 1
        if self._as_worker and self._current is not None and self._current.node == stage.node.number:
            self._follow(self._current, stage)
        if stage.node.number != job.node:
            return
        job.steps_left -= 1
        if self._as_worker:
            if not job.steps_left:
                run.end(job, is_known=True)
            return
        run.backward_measured(job, stage.number, job.backward_began_S[stage.number])
        if not job.steps_left:
            run.end(job)
            if not self._is_asynchronous:
                run.placing.release_next()

    def _send(self, stage: Stage, job: TrainingJob, step: tuple[bool, int]) -> None:
        self._run.push(self._run.now + job.hop_M[step[1]], self._arrived, stage, (job, step))

    def _arrived(self, stage: Stage, what: tuple[TrainingJob, tuple[bool, int]]) -> None:
        self._run.stages.deliver(stage, self._take, stage, what)

    def _take(self, stage: Stage, what: tuple[TrainingJob, tuple[bool, int]]) -> None:
        job, step = what
        job.arrived_S[stage.number].add(step)
        self._follow(job, stage)

    def _follow(self, job: TrainingJob, stage: Stage) -> None:
        """Let the stage have what comes next in the schedule's order, as far as it has arrived."""
        number = stage.number
        if self._as_worker and (job.given_S[number] or stage.steps_done < job.steps_before):
            return
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
            job.given_S[number] = True
            self._run.stages.enqueue(stage, kind, job, microbatch, seconds)
            if self._as_worker:
                return
