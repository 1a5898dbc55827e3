"""What a replay submits and when: a pure function of trace, texts and options."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lemix.items import GenerateItem, Item, ScoreItem, TrainItem
from lemix_common.errors import BadInput
from lemix_studies.texts import Encode, Texts, take_tokens
from lemix_studies.traces import TraceLine

Task = Literal["generate", "score"]
Kind = Literal["generate", "score", "train"]
TASKS: tuple[Task, ...] = ("generate", "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """How a trace becomes a workload."""

    minutes: float | None = None
    """Of the trace, before its times are scaled; None: all of it."""
    time_scale: float = 1.0
    """Arrival times are multiplied by it: 0.5 is twice as fast."""
    length_scale: float = 1.0
    """Numbers of tokens are multiplied by it, and are at least 1."""
    train_every: int = 0
    """Line k (from 0) is a training example when k is a multiple of it; 0: none is."""
    task: Task = "generate"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_scale", "length_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"--{name.replace('_', '-')} {value}: must be a number above 0")
        if self.minutes is not None and not self.minutes > 0:
            raise BadInput(f"--minutes {self.minutes}: must be above 0")
        if self.train_every < 0:
            raise BadInput(f"--train-every {self.train_every}: must be 0 (no training) or more")
        if self.task not in TASKS:
            raise BadInput(f"--task {self.task}: use {' or '.join(TASKS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedArrival:
    """One item of a workload."""

    line: int
    at_s: float
    kind: Kind
    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    """What follows the prompt in the text: scored, learned, or for a generation what it is compared with."""
    is_capped: bool

    def item(self, prefix: str) -> Item:
        """As it is submitted; its id is the prefix and the line."""
        item_id = f"{prefix}-{self.line:06d}"
        match self.kind:
            case "train":
                return TrainItem(self.prompt, self.reference, item_id=item_id)
            case "score":
                return ScoreItem(self.prompt, self.reference, item_id=item_id)
            case "generate":
                return GenerateItem(self.prompt, len(self.reference), ignore_eos=True, item_id=item_id)


@dataclass(frozen=True, slots=True)
class _Sized:
    line: int
    at_s: float
    kind: Kind
    num_prompt: int
    num_reference: int
    is_capped: bool


def plan_workload(
    trace: Sequence[TraceLine], texts: Texts, encode: Encode, options: WorkloadOptions, *, context_length: int
) -> list[PlannedArrival]:
    """Every arrival, in the trace's order; lengths over the context are shortened and marked as capped."""
    limit_s = math.inf if options.minutes is None else 60 * options.minutes
    within = [line for line in trace if line.arrival_s < limit_s]
    sized = [_size(number, line, options, context_length) for number, line in enumerate(within)]
    randomness = random.Random(options.seed)
    trained = _Supply.of([item for item in sized if item.kind == "train"], texts.trained, encode, randomness)
    asked = _Supply.of([item for item in sized if item.kind != "train"], texts.held_out, encode, randomness)
    return [(trained if item.kind == "train" else asked).fill(item) for item in sized]


def fit_lengths(num_prompt: int, num_reference: int, context_length: int) -> tuple[int, int]:
    """Shorten the prompt until both fit; if that isn't enough, what follows it."""
    num_reference = min(num_reference, context_length - 1)
    return min(num_prompt, context_length - num_reference), num_reference


def scale_length(num_tokens: int, options: WorkloadOptions) -> int:
    """A length of the trace in the workload."""
    return max(1, round(num_tokens * options.length_scale))


def _size(number: int, line: TraceLine, options: WorkloadOptions, context_length: int) -> _Sized:
    wanted = scale_length(line.input_tokens, options), scale_length(line.output_tokens, options)
    fitted = fit_lengths(*wanted, context_length)
    is_training = options.train_every > 0 and number % options.train_every == 0
    kind: Kind = "train" if is_training else options.task
    return _Sized(number, line.arrival_s * options.time_scale, kind, *fitted, fitted != wanted)


@dataclass
class _Supply:
    """Tokens handed out in windows that don't overlap."""

    tokens: list[int]
    used: int = 0

    @classmethod
    def of(
        cls, items: Sequence[_Sized], documents: Sequence[str], encode: Encode, randomness: random.Random
    ) -> _Supply:
        needed = sum(item.num_prompt + item.num_reference for item in items)
        return cls(take_tokens(documents, needed, encode, randomness))

    def fill(self, item: _Sized) -> PlannedArrival:
        middle = self.used + item.num_prompt
        start, self.used = self.used, middle + item.num_reference
        return PlannedArrival(
            line=item.line,
            at_s=item.at_s,
            kind=item.kind,
            prompt=tuple(self.tokens[start:middle]),
            reference=tuple(self.tokens[middle : self.used]),
            is_capped=item.is_capped,
        )
