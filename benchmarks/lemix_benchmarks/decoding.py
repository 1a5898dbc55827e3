"""What generation is measured on: requests drawn by a seed, and what is to be said of their answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Final

from lemix_benchmarks.model import VOCABULARY

PROMPT_TOKENS: Final = range(16, 129)
NEW_TOKENS: Final = range(32, 129)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens are to follow it: exactly so many, chosen greedily."""

    number: int
    """Its place in its list."""
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's tokens; times are the monotonic clock's, which processes of one machine share."""

    number: int
    submitted_at: float
    tokens: tuple[int, ...]
    times: tuple[float, ...]
    """When each token was there."""

    @property
    def ttft_s(self) -> float:
        """Submit to first token."""
        return self.times[0] - self.submitted_at

    @property
    def itls_s(self) -> Iterator[float]:
        """From each token to the next."""
        return (after - before for before, after in zip(self.times, self.times[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Answered:
    """A list of requests, and the stretch of time that is measured."""

    answers: tuple[Answer, ...]
    began: float
    ended: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens that came in that time."""
        came = sum(self.began <= at <= self.ended for answer in self.answers for at in answer.times)
        return came / (self.ended - self.began)


def drawn_requests(
    seed: int, count: int, *, prompt_tokens: range = PROMPT_TOKENS, new_tokens: range = NEW_TOKENS
) -> list[Request]:
    """Random prompts of mixed lengths, for answers of mixed lengths."""
    randomness = random.Random(seed)
    return [
        Request(
            number,
            tuple(randomness.choices(range(2, VOCABULARY), k=randomness.choice(prompt_tokens))),
            randomness.choice(new_tokens),
        )
        for number in range(count)
    ]


def poisson_arrivals(seed: int, count: int, *, per_second: float) -> list[float]:
    """When each of so many requests arrives, in seconds from the beginning."""
    randomness, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at += randomness.expovariate(per_second)
        arrivals.append(at)
    return arrivals


def by_new_tokens(requests: Sequence[Request], size: int) -> list[tuple[Request, ...]]:
    """Batches whose answers are about equally long, the longest first, so that no row waits long for another."""
    ordered = sorted(requests, key=lambda request: (-request.new_tokens, len(request.prompt)))
    return [tuple(ordered[first : first + size]) for first in range(0, len(ordered), size)]


def percentile(values: Iterable[float], percent: int) -> float:
    """Between the two nearest values, as numpy has it."""
    found = sorted(values)
    return quantiles(found, n=100, method="inclusive")[percent - 1] if len(found) > 1 else found[0]
