"""Where items go and which nodes there are, by the policy, called as the coordinator calls it.

`place` when an item arrives, or is released, and again for one that was refused whenever anything has been measured,
ended or opened, or at its `again_at`: requests in order of arrival up to the first refused one, then training.
`resize` once before the first arrival and then every tick.

A node that is opened holds weights at once and begins work `load_s` later. One that is closed gets nothing more and
holds weights until it has nothing left. Memory for an item is taken on all stages before its first forward; where there
is none left it waits, in order, and is never dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final, cast

from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.work import Work
from lemix_studies.simulator.cluster import Node
from lemix_studies.simulator.jobs import GenerationJob, Job, TrainingJob, bytes_of
from lemix_studies.simulator.run import Run

PATIENCE_S: Final = 3600.0
"""Of simulated time: a policy that places nothing for so long, while nothing runs, never will."""


class Placing:
    """The policy's side of a run."""

    __slots__ = (
        "_checks_memory",
        "_idle_since",
        "_next_training",
        "_policy",
        "_refused",
        "_refused_training",
        "_run",
        "_shares_passes",
        "held",
    )

    def __init__(self, run: Run) -> None:
        self._run = run
        self._policy = run.scenario.policy
        self._checks_memory = run.scenario.checks_memory
        self._shares_passes = run.scenario.pass_tokens > 0
        self._refused: deque[tuple[Work, int]] = deque()
        self._refused_training: tuple[Work, int] | None = None
        self._next_training = 0
        self._idle_since = run.now
        self.held: list[tuple[int, float, float]] = []
        """Node, from, to: when it held weights that it has let go."""

    def begin(self) -> None:
        """Before the first arrival."""
        self._resize()
        self.release_next()

    # ---- items
    def arrived(self, work: Work, index: int) -> None:
        """A request has come, whose record will be the one of this index."""
        if self._refused:
            self._refused.append((work, index))  # in order: those before it are to be placed first
            self.ask_again()
        elif not self._try_place(work, index):
            self._refused.append((work, index))

    def release_next(self) -> None:
        """The next training item may come."""
        run = self._run
        if self._next_training < len(run.scenario.training):
            run.push(max(run.now, run.scenario.training[self._next_training].arrived_at), self._released)

    def _released(self, _subject: None, _detail: None) -> None:
        run = self._run
        work = run.scenario.training[self._next_training]
        index = len(run.scenario.requests) + self._next_training
        self._next_training += 1
        if work.arrived_at != run.now:
            work = replace(work, arrived_at=run.now)
        if not self._try_place(work, index):
            self._refused_training = (work, index)

    def ask_again(self) -> None:
        """About what was refused."""
        while self._refused and self._try_place(*self._refused[0]):
            self._refused.popleft()
        if self._refused_training is not None and self._try_place(*self._refused_training):
            self._refused_training = None

    def _try_place(self, work: Work, index: int) -> bool:
        run = self._run
        now = run.now
        decision = self._policy.place(run.state, work, now)
        number = decision.node
        if number is None:
            if decision.again_at is not None and decision.again_at > now:
                run.push(decision.again_at, self._due)
            return False
        if not 0 <= number < len(run.nodes) or not run.nodes[number].is_open:
            raise BadInput(
                f"policy {self._policy.name} placed {work.item} on node {number}, which isn't open"
            )
        if run.tells:
            run.state = run.state.assigned(work, number, now)
        node = run.nodes[number]
        node.num_jobs += 1
        job: Job
        if work.kind == "score" and not self._shares_passes:
            job = run.scores.job(work, index, node)
        elif work.kind == "train":
            job = run.trainings.job(work, index, node)
        else:
            job = run.generations.job(work, index, node)
        if node.ready_at > now:
            node.parked.append(job)
        else:
            self._admit(node, job)
        return True

    def _due(self, _subject: None, _detail: None) -> None:
        self._run.is_changed = True

    def _begin(self, node: Node, job: Job) -> None:
        if job.work.kind == "score" and not self._shares_passes:
            self._run.scores.begin(node, job)
        elif job.work.kind == "train":
            self._run.trainings.begin(node, cast("TrainingJob", job))
        else:
            self._run.generations.begin(node, cast("GenerationJob", job))

    def ended(self, job: Job) -> None:
        """What an item had is free."""
        node = self._run.nodes[job.node]
        node.num_jobs -= 1
        if job.bytes_S:
            for stage, held in enumerate(job.bytes_S):
                node.bytes_left[stage] += held
            while node.short_of_memory and self._take_memory(node, node.short_of_memory[0]):
                self._begin(node, node.short_of_memory.popleft())
        if node.is_closing:
            self._let_go(node)

    # ---- memory
    def _admit(self, node: Node, job: Job) -> None:
        """Begin an item, or let it wait for memory; what needs none passes those that do."""
        if self._checks_memory and job.work.kind != "score":
            scenario = self._run.scenario
            job.bytes_S = bytes_of(job.work, scenario.profile, scenario.schedule, scenario.microbatches)
            if node.short_of_memory or not self._take_memory(node, job):
                node.short_of_memory.append(job)
                return
        self._begin(node, job)

    def _take_memory(self, node: Node, job: Job) -> bool:
        for left, wanted in zip(node.bytes_left, job.bytes_S, strict=True):
            if wanted > left:
                return False
        for stage, wanted in enumerate(job.bytes_S):
            node.bytes_left[stage] -= wanted
        return True

    # ---- nodes
    def _tick(self, _subject: None, _detail: None) -> None:
        run = self._run
        if any(node.num_jobs for node in run.nodes) or not (self._refused or self._refused_training):
            self._idle_since = run.now
        elif run.now - self._idle_since > PATIENCE_S:
            raise BadInput(f"policy {self._policy.name} places nothing, though nothing runs")
        self._resize()

    def _resize(self) -> None:
        run = self._run
        waiting = [work for work, _ in self._refused]
        if self._refused_training is not None:
            waiting.append(self._refused_training[0])
        resize = self._policy.resize(run.state, waiting, run.now)
        for number in resize.open:
            self._open(run.nodes[number])
        for number in resize.close:
            self._close(run.nodes[number])
        run.push(run.now + run.scenario.resize_every_s, self._tick)

    def _open(self, node: Node) -> None:
        run = self._run
        if node.is_open:
            return
        node.is_open = True
        if node.is_closing:  # it still holds its weights
            node.is_closing = False
        else:
            node.held_since = run.now
            node.ready_at = run.now + run.profile.load_s
            run.push(node.ready_at, self._loaded, node, node.ready_at)
        run.state = run.state.opening(node.number, max(node.ready_at, run.now))
        run.is_changed = True

    def _loaded(self, node: Node, ready_at: float) -> None:
        if node.ready_at != ready_at:
            return  # it was closed meanwhile
        parked, node.parked = node.parked, []
        for job in parked:
            self._admit(node, job)
        self._run.is_changed = True

    def _close(self, node: Node) -> None:
        if node.is_open:
            node.is_open = False
            node.is_closing = True
            self._run.state = self._run.state.closed(node.number)
            self._let_go(node)

    def _let_go(self, node: Node) -> None:
        """Of the weights, if nothing is left on the node."""
        if not node.num_jobs:
            node.is_closing = False
            node.ready_at = float("-inf")
            self.held.append((node.number, node.held_since, self._run.now))
