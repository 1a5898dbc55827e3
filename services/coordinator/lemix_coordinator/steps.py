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
    tokens: int
    """Of prompt and reference."""
    reference_tokens: int


def entry_order(entry: str) -> tuple[int, int]:
    """A stream entry's id as a value that sorts in submission order."""
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def plan_next_step(
    queued: Sequence[QueuedExample],
    settings: ClusterSettings,
    *,
    run: str,
    step: int,
    flushes: Sequence[str],
) -> tuple[PlannedStep, str] | None:
    """The next step and the stream entry it reaches to, or None while too few examples wait.

    A step has ``step_examples`` examples, or fewer where ``step_tokens`` are reached before; an incomplete one is
    planned only of examples up to an explicit flush. Flushes are taken one by one, so that a planner that was away
    cuts as one that saw each of them in time.
    """
    flushed = [example for example in queued if entry_order(example.entry) <= _next_flush(queued, flushes)]
    size, _ = _step_size(flushed, settings)
    if not size:
        size, is_complete = _step_size(queued, settings)
        size *= is_complete
    chosen = queued[:size]
    if not chosen:
        return None
    cuts = cut_examples([example.tokens for example in chosen], settings)
    planned = PlannedStep(
        run=run,
        step=step,
        items=tuple(example.item for example in chosen),
        cuts=cuts,
        shards=shards_of(len(cuts), settings.virtual_shards),
        reference_tokens=sum(example.reference_tokens for example in chosen),
        learning_rate=learning_rate_at(settings, step),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        max_gradient_norm=settings.max_gradient_norm,
        optimizer=settings.optimizer,
    )
    return planned, chosen[-1].entry


def _next_flush(queued: Sequence[QueuedExample], flushes: Sequence[str]) -> tuple[int, int]:
    """How far the first flush reaches that has examples left."""
    reached = (entry_order(flush) for flush in flushes)
    return min((order for order in reached if order >= entry_order(queued[0].entry)), default=(0, 0))


def _step_size(examples: Sequence[QueuedExample], settings: ClusterSettings) -> tuple[int, bool]:
    """How many of these examples, at most, are one step, and whether another one would be too many."""
    tokens = 0
    for size, example in enumerate(examples[: settings.step_examples]):
        tokens += example.tokens
        if size and tokens > settings.step_tokens > 0:
            return size, True
    return min(len(examples), settings.step_examples), len(examples) >= settings.step_examples


def cut_examples(tokens: Sequence[int], settings: ClusterSettings) -> tuple[int, ...]:
    """How many examples each microbatch packs: contiguous ones, so that gradients add up in submission order."""
    if settings.microbatches:
        return _cut_evenly(tokens, min(settings.microbatches, len(tokens)))
    cuts: list[int] = []
    room = 0
    for length in tokens:
        if cuts and length <= room:
            cuts[-1] += 1
        else:
            cuts.append(1)
            room = settings.microbatch_tokens
        room -= length
    return tuple(cuts)


def _cut_evenly(tokens: Sequence[int], parts: int) -> tuple[int, ...]:
    """Each part takes examples as long as that brings it nearer to its even share of the tokens that are left.

    >>> _cut_evenly([5, 5, 5, 5, 20], 3)
    (3, 1, 1)
    """
    cuts: list[int] = []
    start, left = 0, sum(tokens)
    for after in reversed(range(parts)):
        share, size, stop = left / (after + 1), tokens[start], start + 1
        while stop < len(tokens) - after and (
            not after or abs(size + tokens[stop] - share) <= abs(size - share)
        ):
            size += tokens[stop]
            stop += 1
        cuts.append(stop - start)
        start, left = stop, left - size
    return tuple(cuts)


def weights_of(settings: ClusterSettings, step: int, *, base: int) -> int:
    """The step whose weights a step is computed on: the one before, or with `a-pp` the one before that.

    The first step after ``base``, where the lineage began, has none older, so the second one takes its weights too.
    """
    return max(base, step - 1 - settings.overlaps_steps)


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
