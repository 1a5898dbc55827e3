"""What is simulated, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lemix_common.costs import Profile
from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.policies.policy import Policy
from lemix_coordinator.scheduling.work import Work, WorkKind
from lemix_studies.measures import IdleTimes

Release = Literal["s-pp", "a-pp"]
Order = Literal["fifo", "urgency"]
Batching = Literal["iteration", "paper"]
MicrobatchSchedule = Literal["gpipe", "1f1b"]
Wait = Literal["", "immediate", "far"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Arrivals, a cluster and its rules; equal scenarios have equal outcomes."""

    profile: Profile
    nodes: int
    policy: Policy
    requests: Sequence[Work] = ()
    """In order of arrival."""
    training: Sequence[Work] = ()
    """Each is released when the one before it has come so far (`release`), not before it arrives; each is one step."""
    release: Release = "s-pp"
    """When the next one may come: s-pp, when this one's step has ended; a-pp, when its last forward on stage 0 has."""
    microbatches: int = 1
    """That a training step's rows are cut into, at most one a row."""
    schedule: MicrobatchSchedule = "1f1b"
    order: Order = "fifo"
    """What a stage computes next: by arrival (the paper's), or requests first, training giving way to them."""
    decode_batch: int = 16
    """Rows of an iteration of `generate`, at most."""
    batching: Batching = "iteration"
    """As many iterations on their way as stages, or the paper's rule: one at a time, a first one waits for company."""
    batch_wait_s: float = 0.01
    """`paper`: how long a node without requests waits for more than one."""
    pass_tokens: int = 0
    """Above 0: as the workers do. Prompts and scores share passes, in chunks, of at most so many tokens; and see
    `is_as_workers`. 0: a score is a pass of its own, as in the paper, and prompts are never cut."""
    max_block_s: float = 0.02
    """With `pass_tokens`: what chunks of prompts may add to the time between two tokens of others."""
    cut_s: float = 0.004
    """`urgency`: the longest time between two safepoints of training, about a layer's."""
    min_training_share: float = 0.05
    """`urgency`: of the time in which requests and training both want a stage, what training gets at least."""
    checks_memory: bool = True
    """Whether what doesn't fit waits; without it memory is without bounds."""
    resize_every_s: float = 0.1
    """How often the policy is asked which nodes it needs; the coordinator's tick."""
    slo_s: float | None = None
    """What a request may take, for whoever reads the scenario: policies have it in their options."""
    keep_intervals: bool = False
    """Whether the outcome says what each stage did when; costs a third more time."""
    seed: int = 0
    """Likewise; nothing in the simulator is random."""

    @property
    def is_as_workers(self) -> bool:
        """Whether stages keep to the workers' rules instead of the paper's.

        A worker looks at what has arrived between two passes, or at a safepoint of training: that an iteration has
        ended, too. It has one piece of a step at a time to compute. The next step comes when this one is committed,
        and begins on a stage when that one's optimizer has run there.
        """
        return self.pass_tokens > 0

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise BadInput(f"{self.nodes} nodes: there must be at least 1")
        if self.microbatches < 1 or self.decode_batch < 1:
            raise BadInput("microbatches and decode_batch must be at least 1")
        for name, value, known in (
            ("release", self.release, ("s-pp", "a-pp")),
            ("schedule", self.schedule, ("gpipe", "1f1b")),
            ("order", self.order, ("fifo", "urgency")),
            ("batching", self.batching, ("iteration", "paper")),
        ):
            if value not in known:
                raise BadInput(f"there is no {name} {value!r}: use {', '.join(known)}")
        if self.pass_tokens < 0 or self.max_block_s <= 0:
            raise BadInput("pass_tokens must be 0 or more, max_block_s above 0")
        if self.is_as_workers and self.release == "a-pp" and self.training:
            raise BadInput("pass_tokens: workers that overlap steps (a-pp) are not simulated")
        if self.cut_s <= 0 or self.resize_every_s <= 0:
            raise BadInput("cut_s and resize_every_s must be above 0")
        if not 0 <= self.min_training_share <= 0.9:
            raise BadInput(f"min_training_share {self.min_training_share} must be between 0 and 0.9")
        self._check_works()

    def _check_works(self) -> None:
        last_s = float("-inf")
        for work in self.requests:
            if work.is_training:
                raise BadInput(f"{work.item}: a training item among the requests")
            if work.arrived_at < last_s:
                raise BadInput(f"{work.item}: requests must be in order of arrival")
            if work.kind == "generate" and work.new_tokens < 1:
                raise BadInput(f"{work.item}: a generation of {work.new_tokens} tokens")
            last_s = work.arrived_at
        for work in self.training:
            if not work.is_training:
                raise BadInput(f"{work.item}: a request among the training items")
        names = Counter(work.item for work in (*self.requests, *self.training))
        if len(names) < len(self.requests) + len(self.training):
            raise BadInput(f"{names.most_common(1)[0][0]}: two items of one name")


class Record(NamedTuple):
    """What became of one item; times in seconds."""

    item: str
    kind: WorkKind
    arrived_at: float
    """Of training: when it was released."""
    placed_at: float
    node: int
    began_at: float
    first_token_at: float | None
    """Of `generate`."""
    ended_at: float
    state: str = "done"
    gaps_s: tuple[float, ...] = ()
    """Of `generate`: between successive tokens."""

    @property
    def response_s(self) -> float:
        """From its arrival to its end."""
        return self.ended_at - self.arrived_at


class Interval(NamedTuple):
    """What a stage did for an item; categories are those of reports."""

    node: int
    stage: int
    cat: str
    item: str
    began: float
    ended: float
    waited_for: Wait
    """Of forwards behind stage 0: the stage before it (immediate), a backward that came first (far), or neither."""
    others: tuple[str, ...] = ()
    """Further items of an iteration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a scenario."""

    records: tuple[Record, ...]
    """Requests and then training, each in the scenario's order."""
    intervals: tuple[Interval, ...]
    """In order of their ends; empty unless they were to be kept."""
    node_seconds: float
    """That nodes held weights, loading and draining included, up to the last end."""
    held: tuple[tuple[int, float, float], ...]
    """Node, from, to: when it held weights."""
    paper_span_s: float
    """Sum over nodes of first start to last end."""
    began_at: float
    """When the first item arrived."""
    duration_s: float
    """From there to the last end."""
    idle: IdleTimes
    """What the requests take on an idle node."""
