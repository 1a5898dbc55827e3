"""Stages as servers: what waits for one, what it does next, and when training gives way.

By `fifo` a stage takes what became ready first, whatever it is, and ends what it began. By `urgency` requests go
first; training that runs stops at its next safepoint when a request is ready, unless training is due its least share.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import cast

from lemix_studies.simulator.cluster import (
    CATEGORIES,
    FORWARD,
    ITERATION,
    OPTIMIZER,
    TRAINING_BACKWARD,
    TRAINING_FORWARD,
    Piece,
    Stage,
)
from lemix_studies.simulator.jobs import Iteration, Job, TrainingJob
from lemix_studies.simulator.run import Handler, Run
from lemix_studies.simulator.scenario import Interval, Wait


class Stages:
    """All nodes' stages."""

    __slots__ = ("_as_worker", "_cut_s", "_is_fifo", "_keeps", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run
        self._as_worker = run.scenario.is_as_workers
        self._is_fifo = run.scenario.order == "fifo"
        self._keeps = run.scenario.keep_intervals
        self._cut_s = run.scenario.cut_s

    def enqueue(self, stage: Stage, kind: int, job: Job | Iteration, microbatch: int, seconds: float) -> None:
        """Let a piece that is ready wait for its stage, or begin."""
        run = self._run
        piece = (kind, job, microbatch, seconds, run.now)
        if self._is_fifo:
            if stage.is_busy:
                stage.waiting.append(piece)
            else:
                self._start(stage, piece)
            return
        if kind >= OPTIMIZER:
            run.sequence += 1
            heappush(stage.training, (kind, run.sequence, piece))
        else:
            stage.waiting.append(piece)
        if not stage.is_busy:
            self._start_next(stage)
        elif kind < OPTIMIZER <= stage.piece[0]:
            self._interrupt(stage)

    def deliver(self, stage: Stage, handler: Handler, subject: object, detail: object = None) -> None:
        """Have a stage take in what arrived: at once, but a worker that computes a pass for requests, behind it."""
        if self._as_worker and stage.is_busy and stage.piece[0] < OPTIMIZER:
            stage.inbox.append((handler, subject, detail))
        else:
            handler(subject, detail)

    def _start(self, stage: Stage, piece: Piece) -> None:
        run = self._run
        now = run.now
        kind, job, _, seconds, ready_at = piece
        node = stage.node
        if kind == ITERATION:
            iteration = run.generations.formed(node) if stage.number == 0 else cast("Iteration", job)
            seconds = iteration.seconds(stage.costs)
            piece = (kind, iteration, 0, seconds, ready_at)
        elif cast("Job", job).began_at < 0:
            cast("Job", job).began_at = now
        if kind >= TRAINING_BACKWARD:
            cast("TrainingJob", job).begins(stage.number, kind == TRAINING_FORWARD, now)
        if node.first_start < 0:
            node.first_start = now
        stage.is_busy = True
        stage.piece = piece
        stage.began = now
        stage.end_at = end_at = now + seconds
        stage.turn += 1
        run.sequence += 1
        heappush(run.events, (end_at, run.sequence, self._ended, stage, stage.turn))

    def _start_next(self, stage: Stage) -> None:
        if self._is_fifo:
            if stage.waiting:
                self._start(stage, stage.waiting.popleft())
        elif stage.training and (not stage.waiting or stage.credit.is_due):
            self._start(stage, heappop(stage.training)[2])
            if stage.waiting:
                self._interrupt(stage)
        elif stage.waiting:
            self._start(stage, stage.waiting.popleft())

    def _ended(self, stage: Stage, turn: int) -> None:
        """Of a piece, unless it was interrupted."""
        if stage.turn != turn:
            return
        run = self._run
        piece = stage.piece
        kind, job, microbatch, _, _ = piece
        if self._keeps:
            self._note(stage)
        stage.node.last_end = run.now
        if not self._is_fifo:
            stage.credit.count(
                run.now - stage.began,
                is_training=kind >= OPTIMIZER,
                is_awaited=bool(stage.waiting if kind >= OPTIMIZER else stage.training),
            )
        if kind == FORWARD:
            run.scores.ended(stage, cast("Job", job))
        elif kind == ITERATION:
            run.generations.ended(stage, cast("Iteration", job))
        else:
            run.trainings.ended(stage, kind, cast("TrainingJob", job), microbatch)
        while stage.inbox:
            handler, subject, detail = stage.inbox.popleft()
            handler(subject, detail)
        stage.is_busy = False  # only now: what this piece made ready waits behind what was ready before
        self._start_next(stage)

    def _interrupt(self, stage: Stage) -> None:
        """Have the training that runs stop at its next safepoint, if it isn't through by then."""
        cut_s = self._cut_s
        done_s = self._run.now - stage.began
        at = stage.began + cut_s * max(1, -(-done_s // cut_s))
        if at < stage.end_at:
            stage.turn += 1
            self._run.push(at, self._safepoint, stage, stage.turn)

    def _safepoint(self, stage: Stage, turn: int) -> None:
        if stage.turn != turn:
            return
        now = self._run.now
        kind, job, microbatch, _, ready_at = stage.piece
        if self._keeps:
            self._note(stage)
        stage.credit.count(now - stage.began, is_training=True, is_awaited=True)
        rest: Piece = (kind, job, microbatch, stage.end_at - now, ready_at)
        heappush(stage.training, (kind, -1, rest))  # before others of its kind: it was the first of them
        stage.is_busy = False
        stage.node.last_end = now
        self._start_next(stage)

    def _note(self, stage: Stage) -> None:
        """An interval of what has ended, or was interrupted."""
        kind, job, _, _, ready_at = stage.piece
        waited: Wait = ""
        if stage.number and kind in {FORWARD, ITERATION, TRAINING_FORWARD}:
            if stage.began <= ready_at:
                waited = "immediate"
            elif stage.last_backward > ready_at:
                waited = "far"
        if kind == ITERATION:
            iteration = cast("Iteration", job)
            category = CATEGORIES[FORWARD] if iteration.prompts else CATEGORIES[ITERATION]
            items = [one.work.item for one in iteration.all]
        else:
            category, items = CATEGORIES[kind], [cast("Job", job).work.item]
        now = self._run.now
        self._run.intervals.append(
            Interval(
                *(stage.node.number, stage.number, category, items[0]),
                *(stage.began, now, waited, tuple(items[1:])),
            )
        )
