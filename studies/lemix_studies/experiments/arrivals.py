"""When requests arrive: at random, all at once, at rates that alternate, or as in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from lemix_common.errors import BadInput

ALTERNATING: Final = (6, 12, 29, 15, 8, 20, 11, 6, 24, 19, 30, 14)
"""Requests a second of the paper's segments."""


def poisson(number: int, rate: float, randomness: Random) -> list[float]:
    """Seconds of arrivals whose gaps are exponential, the first gap included."""
    times, now = [], 0.0
    for _ in range(number):
        now += randomness.expovariate(rate)
        times.append(now)
    return times


def alternating(number: int, mean_rate: float, randomness: Random) -> list[float]:
    """Poisson in segments of the paper's rates, scaled to a mean, each with requests in proportion to its rate."""
    total = sum(ALTERNATING)
    scale = mean_rate * len(ALTERNATING) / total
    shares = [number * rate // total for rate in ALTERNATING]
    by_rate = sorted(range(len(ALTERNATING)), key=lambda segment: -ALTERNATING[segment])
    for turn in range(number - sum(shares)):
        shares[by_rate[turn % len(by_rate)]] += 1
    times: list[float] = []
    for rate, share in zip(ALTERNATING, shares, strict=True):
        began = times[-1] if times else 0.0
        times += [began + time for time in poisson(share, scale * rate, randomness)]
    return times


def as_traced(number: int, mean_rate: float, trace: Sequence[float]) -> list[float]:
    """The first arrivals of a trace, its time scaled so that they come at a mean rate."""
    if len(trace) < number:
        raise BadInput(f"the trace has {len(trace)} requests, a point needs {number}: give a longer one")
    first, last = trace[0], trace[number - 1] if number else trace[0]
    if last <= first:
        return [0.0] * number
    scale = number / mean_rate / (last - first)
    return [scale * (time - first) for time in trace[:number]]
