"""Generations: requests that share iterations, hybrid batches of newcomers' prompts and others' next tokens.

`iteration`: as many iterations are on their way as there are stages, so those that decode go round in as many groups.
`paper`: one at a time; a node that has none waits for company, up to a full batch or `batch_wait_s`. Who is in an
iteration is decided when stage 0 begins it.

With `pass_tokens` prompts come in chunks, and scores are prompts without an answer, as in the workers: an iteration
has at most so many tokens, and beside those who decode no more than they may be asked to wait for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from lemix_coordinator.scheduling.work import Work
from lemix_studies.simulator.cluster import ITERATION, Generating, Node, Stage
from lemix_studies.simulator.jobs import GenerationJob, Iteration
from lemix_studies.simulator.run import Run

LEAST_CHUNK: Final = 16
"""Tokens of prompts that an iteration takes at least, however many rows decode."""
WITHOUT_LIMIT: Final = 2**31


class Generations:
    """All nodes' generations."""

    __slots__ = ("_as_worker", "_at_once", "_batch", "_chunk", "_is_paper", "_most_tokens", "_run", "_wait_s")

    def __init__(self, run: Run) -> None:
        scenario = run.scenario
        self._run = run
        self._is_paper = scenario.batching == "paper"
        self._as_worker = scenario.is_as_workers
        self._at_once = 1 if self._is_paper else run.num_stages
        """Iterations on their way."""
        self._batch = scenario.decode_batch
        self._wait_s = scenario.batch_wait_s
        is_cut = scenario.pass_tokens > 0 and not self._is_paper
        self._most_tokens = scenario.pass_tokens if is_cut else WITHOUT_LIMIT
        token_s = max(stage.forward.token for stage in run.profile.stages)
        self._chunk = int(scenario.max_block_s / token_s) if is_cut and token_s else WITHOUT_LIMIT

    def job(self, work: Work, index: int, node: Node) -> GenerationJob:
        """Without a token."""
        return GenerationJob(work, index, node.number, self._run.now)

    def begin(self, node: Node, job: GenerationJob) -> None:
        """In line for its prompts' passes."""
        self._run.stages.deliver(node.stages[0], self._line_up, node, job)

    def _line_up(self, node: Node, job: GenerationJob) -> None:
        node.generating.waiting.append(job)
        self._ask(node)

    def formed(self, node: Node) -> Iteration:
        """Who rests, a group of them, and prompts as far as there is room."""
        generating = node.generating
        iteration = Iteration()
        group = min(self._batch, -(-generating.num_rows // self._at_once))
        resting = generating.resting
        while resting and (not iteration.rows or iteration.rows + resting[0].num_decoding <= group):
            iteration.decode(resting.popleft())
        budget = self._most_tokens
        if generating.num_rows and budget < WITHOUT_LIMIT:
            budget = max(min(self._chunk, budget - iteration.rows), LEAST_CHUNK)
        rows = iteration.rows
        while budget > 0 and generating.waiting and self._may_join(generating):
            job = generating.waiting[0]
            if rows and rows + job.num_decoding > self._batch:
                break
            if not job.planned:
                job.began_at = self._run.now
            budget -= iteration.prefill(job, budget)
            if job.planned == job.num_tokens:
                generating.waiting.popleft()
                generating.num_rows += job.num_decoding
                rows += job.num_decoding
        generating.is_asked = False
        generating.in_flight += 1
        return iteration

    def ended(self, stage: Stage, iteration: Iteration) -> None:
        """On a stage: on to the next one; behind the last everybody has a token."""
        run = self._run
        for job in iteration.through:
            run.forward_measured(job, stage.number, stage.began)
        if stage.number + 1 < run.num_stages:
            hop_s = run.profile.hop.of(iteration.prompt_tokens + iteration.rows)
            run.push(run.now + hop_s, self._arrived, stage.node.stages[stage.number + 1], iteration)
        elif self._as_worker:  # it is stage 0 that plans, and tells the clients
            run.stages.deliver(stage.node.stages[0], self._tokens, stage.node, iteration)
        else:
            self._tokens(stage.node, iteration)
            return
        if not (self._as_worker and stage.number):
            self._ask(stage.node)

    def _tokens(self, node: Node, iteration: Iteration) -> None:
        """An iteration is through: everybody in it has a token."""
        generating = node.generating
        generating.in_flight -= 1
        for job in iteration.decoding + iteration.through:
            if not job.num_decoding:
                self._run.end(job)
                continue
            times = job.token_times
            times.append(self._run.now)
            if len(times) < job.work.new_tokens:
                generating.resting.append(job)
            else:
                generating.num_rows -= job.num_decoding
                gaps_s = tuple([later - earlier for earlier, later in pairwise(times)])
                self._run.end(job, times[0], gaps_s)
        self._ask(node)

    def _arrived(self, stage: Stage, iteration: Iteration) -> None:
        self._run.stages.deliver(stage, self._wait, iteration, stage)

    def _wait(self, iteration: Iteration, stage: Stage) -> None:
        self._run.stages.enqueue(stage, ITERATION, iteration, 0, 0.0)

    def _ask(self, node: Node) -> None:
        """Let an iteration wait for stage 0, if there is room for one and somebody to be in it."""
        generating = node.generating
        if generating.is_asked or generating.in_flight >= self._at_once:
            return
        if not generating.resting:
            if not generating.waiting or not self._may_join(generating):
                return
            if self._is_paper and not generating.num_rows and len(generating.waiting) < self._batch:
                at = generating.waiting[0].placed_at + self._wait_s
                if self._run.now < at:
                    self._run.push(at, self._gathered, node)
                    return
        generating.is_asked = True
        self._run.stages.enqueue(node.stages[0], ITERATION, Iteration(), 0, 0.0)

    def _gathered(self, node: Node, _detail: None) -> None:
        self._ask(node)

    def _may_join(self, generating: Generating) -> bool:
        """The first in line; whoever has more rows than a batch is alone."""
        wanted = generating.waiting[0].num_decoding
        return not generating.num_rows or generating.num_rows + wanted <= self._batch * self._at_once
