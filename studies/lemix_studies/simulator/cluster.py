"""The simulated cluster: nodes, their stages, and what is on them. Mutable, and one run's alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from lemix_common.costs import StageCosts
from lemix_studies.simulator.jobs import GenerationJob, Iteration, Job
from lemix_studies.simulator.tenancy import Credit

# What a stage can be asked for; what is lower goes first where order is by urgency.
ITERATION, FORWARD, OPTIMIZER, TRAINING_BACKWARD, TRAINING_FORWARD = range(5)
CATEGORIES: Final = ("decode", "prefill", "optimizer", "training_backward", "training_forward")
"""Of reports; an iteration with prompts in it is a prefill."""

Piece = tuple[int, Job | Iteration, int, float, float]
"""Kind, whose, microbatch, seconds that are left of it, since when it could have begun."""


class Stage:
    """A stage of a node: a server, what it does, and what waits for it."""

    __slots__ = (
        "began",
        "costs",
        "credit",
        "end_at",
        "inbox",
        "is_busy",
        "last_backward",
        "node",
        "number",
        "optimizer_s",
        "piece",
        "steps_done",
        "training",
        "turn",
        "waiting",
    )

    def __init__(self, node: Node, number: int, costs: StageCosts, credit: Credit) -> None:
        self.node = node
        self.number = number
        self.costs = costs
        self.optimizer_s = costs.optimizer_s
        self.credit = credit
        self.is_busy = False
        self.piece: Piece = (FORWARD, Iteration(), 0, 0.0, 0.0)
        self.began = self.end_at = 0.0
        self.turn = 0
        """Rises with each piece and safepoint: an event of an earlier one is void."""
        self.last_backward = float("-inf")
        """When the last backward ended here."""
        self.waiting: deque[Piece] = deque()
        """In the paper's order everything, else requests."""
        self.training: list[tuple[int, int, Piece]] = []
        """By urgency: a heap of what training has ready."""
        self.inbox: deque[tuple[Callable[[Any, Any], None], Any, Any]] = deque()
        """What a worker that computes for requests hasn't looked at yet."""
        self.steps_done = 0
        """As a worker: training steps whose optimizer has run here."""


class Node:
    """A node, and what is on it."""

    __slots__ = (
        "bytes_left",
        "first_start",
        "generating",
        "held_since",
        "is_closing",
        "is_open",
        "last_end",
        "num_jobs",
        "number",
        "parked",
        "ready_at",
        "short_of_memory",
        "stages",
    )

    def __init__(self, number: int, now: float, bytes_left: list[float]) -> None:
        self.number = number
        self.stages: list[Stage] = []
        self.is_open = True
        self.is_closing = False
        """It gets nothing more, and has something left."""
        self.ready_at = float("-inf")
        """While it loads: when it will have."""
        self.held_since = now
        self.first_start = -1.0
        self.last_end = 0.0
        self.num_jobs = 0
        self.bytes_left = bytes_left
        """Of each stage."""
        self.short_of_memory: deque[Job] = deque()
        self.parked: list[Job] = []
        """For the end of loading."""
        self.generating = Generating()


class Generating:
    """A node's requests that get tokens."""

    __slots__ = ("in_flight", "is_asked", "num_rows", "resting", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[GenerationJob] = deque()
        """For their prompts' passes; of the first a part may be done."""
        self.resting: deque[GenerationJob] = deque()
        """For their next token's."""
        self.num_rows = 0
        """Of those whose prompts are through, resting or on their way."""
        self.in_flight = 0
        self.is_asked = False
        """An iteration waits for stage 0."""
