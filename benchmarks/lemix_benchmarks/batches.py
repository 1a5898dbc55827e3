"""What training is measured on: steps of examples of one length, or of a text's, put together as a peer pads them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Final

from tokenizers import Tokenizer

from lemix.rows import read_rows

LONGEST_SHARE: Final = 0.05
"""Of a sample: those over its 95th percentile of length are left out, since one of them pads a whole batch."""


@dataclass(frozen=True, slots=True)
class Example:
    """The reference's tokens, after the prompt's."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Both parts'."""
        return len(self.prompt) + len(self.reference)


Batch = tuple[Example, ...]
"""The examples of a step."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What somebody made of some steps."""

    seconds: float
    """From the first one's begin to the end of the last one's optimizer."""
    losses: tuple[float, ...]
    """Each step's, a mean over its references' tokens."""


Train = Callable[[Sequence[Batch]], Trained]
"""Runs these steps one after another; before and after it nothing of it computes."""


def made_up_batches(seed: int, *, examples: int, tokens: int, vocabulary: int) -> Iterator[Batch]:
    """Without end: random tokens, all but the first of which are to be learned, so that every position counts."""
    randomness = random.Random(seed)
    while True:
        drawn = (tuple(randomness.choices(range(2, vocabulary), k=tokens)) for _ in range(examples))
        yield tuple(Example(ids[:1], ids[1:]) for ids in drawn)


def sampled_rows(path: Path, tokenizer: Tokenizer, *, count: int, seed: int) -> list[Example]:
    """A sample of a file's rows, those over its 95th percentile of length left out."""
    rows = random.Random(seed).sample(read_rows(path), count)
    sample = [
        Example(
            tuple(tokenizer.encode(row.prompt).ids),
            tuple(tokenizer.encode(row.reference, add_special_tokens=False).ids),
        )
        for row in rows
    ]
    longest = quantiles((example.num_tokens for example in sample), n=20, method="inclusive")[-1]
    return [example for example in sample if example.num_tokens <= longest]


def by_length(examples: Sequence[Example], size: int) -> list[Batch]:
    """Batches of examples of similar length, the shortest first; the longest that don't fill one are left over."""
    ordered = sorted(examples, key=lambda example: example.num_tokens)
    whole = len(ordered) - len(ordered) % size
    return [tuple(ordered[first : first + size]) for first in range(0, whole, size)]


def dealt(batches: Sequence[Batch], rounds: int) -> list[tuple[Batch, ...]]:
    """The batches of each round: every round has short and long ones, and as many as any other."""
    each = len(batches) // rounds
    return [tuple(batches[number : rounds * each : rounds]) for number in range(rounds)]


def real_tokens(batches: Sequence[Batch]) -> int:
    """Tokens without padding."""
    return sum(example.num_tokens for batch in batches for example in batch)


def padding_share(batches: Sequence[Batch]) -> float:
    """The part of the tokens that is padding if every example is as long as its batch's longest."""
    padded = sum(len(batch) * longest(batch) for batch in batches)
    return 1 - real_tokens(batches) / padded if padded else 0.0


def longest(batch: Batch) -> int:
    """Tokens of a batch's longest example."""
    return max(example.num_tokens for example in batch)
