"""What a training step consists of: a pure function of submission order and settings, never of timing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lemix_common.settings import ClusterSettings
from lemix_common.store.training import PlannedStep


@dataclass(frozen=True, slots=True)
class QueuedExample:
    """A training example that no step has yet."""

    entry: str
    """Its id in the stream of examples, which is its place in submission order."""
    item: str
    reference_tokens: int


def entry_order(entry: str) -> tuple[int, int]:
    """A stream entry's id as a value that sorts in submission order."""
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def plan_next_step(
    queued: Sequence[QueuedExample], settings: ClusterSettings, *, run: str, step: int, flush_until: str
) -> tuple[PlannedStep, str] | None:
    """The next step and the stream entry it reaches to, or None while too few examples wait.

    A step has ``step_examples`` examples; a smaller one is planned only of examples up to an explicit flush.
    """
    size = settings.step_examples
    flushed = [
        example
        for example in queued
        if flush_until and entry_order(example.entry) <= entry_order(flush_until)
    ]
    chosen = flushed[:size] or (list(queued[:size]) if len(queued) >= size else [])
    if not chosen:
        return None
    planned = PlannedStep(
        run=run,
        step=step,
        items=tuple(example.item for example in chosen),
        shards=shards_of(len(chosen), settings.virtual_shards),
        reference_tokens=sum(example.reference_tokens for example in chosen),
        learning_rate=learning_rate_at(settings, step),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        max_gradient_norm=settings.max_gradient_norm,
        optimizer=settings.optimizer,
    )
    return planned, chosen[-1].entry


def learning_rate_at(settings: ClusterSettings, step: int) -> float:
    """The learning rate of a step (the first is 1): a linear warm-up, then constant, or a line or cosine down to 0."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / (settings.warmup_steps + 1)
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    falling = settings.schedule_steps - settings.warmup_steps
    done = min(1.0, (step - 1 - settings.warmup_steps) / falling)
    share = 1 - done if settings.learning_rate_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * share


def shards_of(microbatches: int, shards: int) -> tuple[int, ...]:
    """The virtual shard of each microbatch: contiguous, sizes differing by one at most, larger ones first.

    >>> shards_of(6, 4)
    (0, 0, 1, 1, 2, 3)
    """
    each, more = divmod(microbatches, shards)
    sizes = [each + (shard < more) for shard in range(shards)]
    return tuple(shard for shard, size in enumerate(sizes) for _ in range(size))
