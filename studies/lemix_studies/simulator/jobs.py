"""What runs in the simulator: items on their way through the stages of a node. Mutable, and the simulation's alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lemix_common.costs import Profile, StageCosts
from lemix_common.partition import cut_layers
from lemix_common.schedules import Work as Pass
from lemix_common.schedules import held_by_stage, schedule_named
from lemix_coordinator.scheduling.work import Work

Step = tuple[bool, int]
"""Whether it is a forward, and its microbatch."""


class Job:
    """An item from its placing to its end."""

    __slots__ = ("began_at", "bytes_S", "forward_S", "hop_s", "index", "node", "placed_at", "work")

    def __init__(self, work: Work, index: int, node: int, placed_at: float) -> None:
        self.work = work
        self.index = index
        """Its record's."""
        self.node = node
        self.placed_at = placed_at
        self.began_at = -1.0
        self.bytes_S: tuple[float, ...] = ()
        """That it holds on each stage from before its first forward to its end; empty: nothing to speak of."""
        self.forward_S: Sequence[float] = ()
        """Seconds on each stage, of a score."""
        self.hop_s = 0.0


class TrainingJob(Job):
    """A training step; M microbatches on S stages."""

    __slots__ = (
        "arrived_S",
        "backward_MS",
        "backward_began_S",
        "backwards_left",
        "forward_MS",
        "forward_began_S",
        "forwards_left_S",
        "given_S",
        "hop_M",
        "next_S",
        "order_S",
        "steps_before",
        "steps_left",
    )

    def __init__(
        self, work: Work, index: int, node: int, placed_at: float, orders: Sequence[Sequence[Step]]
    ) -> None:
        super().__init__(work, index, node, placed_at)
        num_stages, microbatches = len(orders), len(orders[0]) // 2
        self.order_S = orders
        """What each stage does, in this order."""
        self.next_S = [0] * num_stages
        """How much of its order each stage has been given."""
        self.arrived_S: list[set[Step]] = [set() for _ in orders]
        """What each stage could do, or has done."""
        self.forward_MS: Sequence[Sequence[float]] = ()
        self.backward_MS: Sequence[Sequence[float]] = ()
        self.hop_M: Sequence[float] = ()
        self.forward_began_S = [-1.0] * num_stages
        """The first microbatch's."""
        self.backward_began_S = [-1.0] * num_stages
        self.forwards_left_S = [microbatches] * num_stages
        self.backwards_left = microbatches
        """On stage 0, which ends last."""
        self.steps_left = num_stages
        """Of the optimizer."""
        self.given_S = [False] * num_stages
        """As a worker: whether a stage has a piece of it to compute, one at a time."""
        self.steps_before = 0
        """As a worker: whose optimizers have to have run on a stage before its first piece."""

    def begins(self, stage: int, is_forward: bool, now: float) -> None:
        """Note a pass's begin, if it is its kind's first on that stage."""
        began = self.forward_began_S if is_forward else self.backward_began_S
        if began[stage] < 0:
            began[stage] = now


class GenerationJob(Job):
    """A request that gets tokens, one an iteration, or a score that shares passes with such."""

    __slots__ = ("num_decoding", "num_tokens", "planned", "token_times")

    def __init__(self, work: Work, index: int, node: int, placed_at: float) -> None:
        super().__init__(work, index, node, placed_at)
        self.num_tokens = sum(work.lengths)
        """Of its prompts."""
        self.planned = 0
        """How many of these are computed, or on their way."""
        self.num_decoding = len(work.lengths) if work.kind == "generate" else 0
        """Rows, once its prompts are through."""
        self.token_times: list[float] = []

    def take(self, budget: int) -> tuple[int, int]:
        """Have up to so many more tokens of its prompts computed: their number, and Σ(length · context)."""
        if budget >= self.num_tokens and not self.planned:
            self.planned = self.num_tokens
            return self.num_tokens, self.work.contexts
        taken = contexts = 0
        row_begins = 0
        for length in self.work.lengths:
            start = max(self.planned - row_begins, 0)
            chunk = min(max(length - start, 0), budget - taken)
            contexts += chunk * (start + chunk)
            taken += chunk
            self.planned += chunk
            row_begins += length
        return taken, contexts


class Iteration:
    """A hybrid batch on its way through a node's stages; formed when stage 0 begins it."""

    __slots__ = ("contexts", "decoding", "prompt_contexts", "prompt_tokens", "prompts", "rows", "through")

    def __init__(self) -> None:
        self.decoding: list[GenerationJob] = []
        self.prompts: list[GenerationJob] = []
        """Those of whose prompts, or of which as scores, a part is in it."""
        self.through: list[GenerationJob] = []
        """Of these, those with the last part."""
        self.rows = self.contexts = self.prompt_tokens = self.prompt_contexts = 0

    def decode(self, job: GenerationJob) -> None:
        """Have a request's next tokens computed."""
        self.decoding.append(job)
        self.rows += job.num_decoding
        self.contexts += job.num_tokens + job.num_decoding * len(job.token_times)

    def prefill(self, job: GenerationJob, budget: int) -> int:
        """Have some of its prompts computed: how many tokens."""
        tokens, contexts = job.take(budget)
        self.prompts.append(job)
        self.prompt_tokens += tokens
        self.prompt_contexts += contexts
        if job.planned == job.num_tokens:
            self.through.append(job)
        return tokens

    def seconds(self, costs: StageCosts) -> float:
        """On a stage of such costs: one pass."""
        return costs.iteration_s(self.prompt_tokens, self.prompt_contexts, self.rows, self.contexts)

    @property
    def all(self) -> list[GenerationJob]:
        """Everybody in it."""
        return self.decoding + self.prompts


@lru_cache(maxsize=256)
def orders_of(schedule: str, stages: int, microbatches: int) -> tuple[tuple[Step, ...], ...]:
    """Each stage's order of forwards and backwards in one step."""
    known = schedule_named(schedule, stages=stages, microbatches=microbatches)
    return tuple(
        tuple((action.work is Pass.FORWARD, action.microbatch) for action in order) for order in known.orders
    )


@lru_cache(maxsize=256)
def held_of(schedule: str, stages: int, microbatches: int) -> tuple[int, ...]:
    """Of how many microbatches each stage holds the activations at a time."""
    return held_by_stage(schedule_named(schedule, stages=stages, microbatches=microbatches))


def microbatches_of(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Tokens and contexts of each microbatch: contiguous rows, so that the largest is as small as can be."""
    number = min(most, len(lengths))
    if number == 1:
        return [(sum(lengths), sum([length * length for length in lengths]))]
    return [
        (sum(lengths[row] for row in rows), sum(lengths[row] ** 2 for row in rows))
        for rows in cut_layers(list(lengths), number)
    ]


def bytes_of(work: Work, profile: Profile, schedule: str, microbatches: int) -> tuple[float, ...]:
    """What an item holds on each stage; of scores, whose activations are gone at once, nothing."""
    if work.kind == "score":
        return ()
    if work.kind == "generate":
        tokens = work.tokens + len(work.lengths) * work.new_tokens
        return tuple([stage.kv_token_bytes * tokens for stage in profile.stages])
    parts = microbatches_of(work.lengths, microbatches)
    held = held_of(schedule, profile.num_stages, len(parts))
    return tuple(
        [
            number * max([stage.activation_bytes.of(tokens, contexts) for tokens, contexts in parts])
            for number, stage in zip(held, profile.stages, strict=True)
        ]
    )
