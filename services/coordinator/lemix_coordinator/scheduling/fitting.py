"""From measurements to the lines of a profile: relative least squares without negative coefficients.

A pass of 16 tokens matters as much as one of 1,024, so what is made small is the sum of ((predicted − measured) ÷
measured)²: least squares in which each sample weighs the inverse of its square. Nothing costs less for being longer, so
no coefficient may be negative. With three of them that is solved by trying: the best fit is the least-squares fit of
one of the seven sets of coefficients that aren't held at zero (the Karush-Kuhn-Tucker conditions of non-negative least
squares, Lawson & Hanson 1974, chapter 23, say as much).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Final

import numpy as np

from lemix_common.costs import Cost

HOLD_OUT_EVERY: Final = 4
"""Of a grid in order: the samples between those that are fitted to."""
_COLUMNS: Final = (0, 1, 2)
_SETS: Final = [chosen for count in (1, 2, 3) for chosen in combinations(_COLUMNS, count)]
"""The coefficients that may be other than zero; the fewest first."""
_BETTER_BY: Final = 1e-9
"""Of two sets that fit alike, the smaller one's coefficients say all there is."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one pass took."""

    tokens: float
    contexts: float
    """Σ(length · context) of its sequences."""
    measured: float
    """Seconds, or bytes; more than nothing."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A line, and how far it is off."""

    cost: Cost
    """Fitted to all samples."""
    errors: tuple[float, ...]
    """|predicted ÷ measured − 1| of each sample, by a line that was fitted to others; none if there are too few."""

    @property
    def held_out_error(self) -> float | None:
        """Their median."""
        return median(self.errors) if self.errors else None


def fit(samples: Sequence[Sample], *, every: int = HOLD_OUT_EVERY) -> Fit:
    """The line through some samples, and the errors of such a line on samples it hasn't seen.

    Each ``every``-th sample is held out of a fit to the others, in ``every`` turns, so that each is held out once.
    """
    errors: list[float] = []
    for first in range(every):
        held_out = samples[first::every]
        seen = [sample for index, sample in enumerate(samples) if index % every != first]
        if held_out and len(seen) >= len(_COLUMNS):
            errors += relative_errors(fit_cost(seen), held_out)
    return Fit(fit_cost(samples), tuple(errors))


def fit_cost(samples: Sequence[Sample]) -> Cost:
    """The line with no negative coefficient that is relatively nearest to the samples; without samples, nothing."""
    if not samples:
        return Cost()
    rows = [[1.0, sample.tokens, sample.contexts] for sample in samples]
    features = np.array(rows) / np.array([sample.measured for sample in samples])[:, None]
    norms = np.linalg.norm(features, axis=0)  # a context's coefficient is a millionth of the base
    scale = np.where(norms > 0, norms, 1.0)
    features /= scale
    best, least = np.zeros(len(_COLUMNS)), np.inf
    for chosen in _SETS:
        part = features[:, chosen]
        solution, *_ = np.linalg.lstsq(part, np.ones(len(samples)), rcond=None)
        residual = float(np.square(part @ solution - 1).sum())
        if (solution >= 0).all() and residual < least * (1 - _BETTER_BY):
            best, least = np.zeros(len(_COLUMNS)), residual
            best[list(chosen)] = solution
    base, token, context = (best / scale).tolist()
    return Cost(base, token, context)


def relative_errors(cost: Cost, samples: Sequence[Sample]) -> list[float]:
    """|predicted ÷ measured − 1| of each."""
    return [abs(cost.of(sample.tokens, sample.contexts) / sample.measured - 1) for sample in samples]
