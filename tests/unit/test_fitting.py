from __future__ import annotations

import random
from statistics import median

import pytest

from lemix_common.costs import Cost
from lemix_coordinator.scheduling.fitting import Sample, fit, fit_cost, relative_errors

LINE = Cost(base=0.004, token=0.0003, context=7e-8)
ROWS = [(n,) for n in (8, 16, 32, 64, 128, 256, 512, 1024)] + [(64,) * 4, (128,) * 4, (256,) * 2, (300, 100)]


def samples(line: Cost, *, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    """A grid as it is measured, each sample off by up to this share."""
    drawn = random.Random(seed)
    grid = [(sum(row), sum(length * length for length in row)) for row in ROWS]
    return [
        Sample(tokens, contexts, line.of(tokens, contexts) * (1 + drawn.uniform(-noise, noise)))
        for tokens, contexts in grid
    ]


def test_a_line_is_found_again() -> None:
    """Without noise every coefficient is, though one is a hundred thousand times another."""
    found = fit_cost(samples(LINE))
    assert (found.base, found.token, found.context) == pytest.approx((LINE.base, LINE.token, LINE.context))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_averaged(seed: int) -> None:
    """With samples off by up to 10 %, most predictions are off by less than 5 %, and none by as much as a sample."""
    found = fit_cost(samples(LINE, noise=0.1, seed=seed))
    errors = relative_errors(found, samples(LINE))
    assert median(errors) < 0.05
    assert max(errors) < 0.1


def test_small_passes_matter_as_much_as_large_ones() -> None:
    """What counts is the relative error, so a large pass that is off doesn't spoil the small ones."""
    *others, largest = sorted(samples(LINE), key=lambda sample: sample.measured)
    found = fit_cost([*others, Sample(largest.tokens, largest.contexts, 1.1 * largest.measured)])
    assert found.of(8, 64) == pytest.approx(LINE.of(8, 64), rel=0.02)


def test_no_coefficient_is_negative() -> None:
    """Where plain least squares would have one that is, it is zero, and the others are the best without it."""
    found = fit_cost(
        [Sample(8, 64, 1.0), Sample(64, 4096, 8.0), Sample(512, 2**18, 50.0), Sample(256, 2**16, 30.0)]
    )
    assert found.context == 0
    assert found.token > 0
    falling = fit_cost([Sample(1, 0, 2.0), Sample(10, 0, 1.0)])
    assert (falling.token, falling.context) == (0, 0)
    assert falling.base == pytest.approx(1.2)


def test_the_error_is_of_samples_that_were_not_seen() -> None:
    """A line has none on what it was made of; what isn't a line has one, whatever it is fitted to."""
    assert fit(samples(LINE)).held_out_error == pytest.approx(0, abs=1e-9)
    assert len(fit(samples(LINE)).errors) == len(ROWS)
    noisy = fit(samples(LINE, noise=0.2))
    assert noisy.held_out_error is not None
    assert 0.03 < noisy.held_out_error < 0.2


def test_too_few_samples_have_no_error() -> None:
    """Three coefficients need three samples, so nothing can be held out of three."""
    assert fit(samples(LINE)[:3]).held_out_error is None
    assert fit([]).cost == Cost()
