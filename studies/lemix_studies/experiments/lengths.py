"""How long items are, in tokens: rows of a file, or drawn so that they have the same percentiles.

The paper's texts are HH-RLHF's (harmless): a query of several turns, and a reference answer. Where no file of their
lengths is given, they are drawn by the percentiles below, linearly between them, query and reference independently
(in the texts their rank correlation is 0.15). Means come out 1 % above the texts'.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from lemix_common.errors import BadInput
from lemix_studies.experiments.settings import LengthOrder

HEADER: Final = ("query_tokens", "reference_tokens")
PERCENTS: Final = (0, 1, 5, 10, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95, 97.5, 99, 99.9, 100)
QUERY: Final = (6, 10, 12, 14, 17, 19, 23, 41, 64, 86, 115, 156, 229, 300, 389, 496, 761, 864)
REFERENCE: Final = (0, 3, 6, 8, 12, 15, 17, 22, 28, 36, 48, 64, 92, 122, 155, 207, 269, 465)
"""Tokens at these percentiles, of 2,865 rows."""


class Row(NamedTuple):
    """A query and the answer that follows it, in tokens."""

    query: int
    reference: int

    @property
    def tokens(self) -> int:
        return self.query + self.reference


def read_lengths(path: Path) -> list[Row]:
    """The rows of a CSV with the columns of `HEADER`; `BadInput` names the line that is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} can't be read ({error})") from None
    if not lines or tuple(lines[0]) != HEADER:
        raise BadInput(f"{path}:1: the header must be {','.join(HEADER)}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        try:
            query, reference = map(int, cells)
        except ValueError:
            raise BadInput(f"{path}:{number}: not two numbers of tokens: {','.join(cells)[:80]}") from None
        if query < 0 or reference < 0 or query + reference < 1:
            raise BadInput(f"{path}:{number}: lengths must not be below 0, nor both 0")
        rows.append(Row(query, reference))
    if not rows:
        raise BadInput(f"{path}: no rows in it")
    return rows


def drawn_lengths(number: int, randomness: Random) -> list[Row]:
    """Rows with the percentiles of the paper's texts."""
    return [Row(_quantile(QUERY, randomness), _quantile(REFERENCE, randomness)) for _ in range(number)]


def in_random_order(rows: Sequence[Row], number: int, randomness: Random) -> list[Row]:
    """So many rows, none twice before all have been taken."""
    taken: list[Row] = []
    while len(taken) < number:
        taken += randomness.sample(rows, min(len(rows), number - len(taken)))
    return taken


def around_the_mean(rows: Sequence[Row], number: int, sigma: float, randomness: Random) -> list[Row]:
    """Lengths drawn from a normal distribution around the rows' mean: for each, the nearest row that is left."""
    mean = sum(row.tokens for row in rows) / len(rows)
    copies = -(-number // len(rows))
    left = sorted((row for _ in range(copies) for row in rows), key=lambda row: (row.tokens, row))
    tokens = [row.tokens for row in left]
    taken = []
    for _ in range(number):
        wanted = randomness.gauss(mean, sigma)
        at = bisect_left(tokens, wanted)
        if at == len(tokens) or (at and wanted - tokens[at - 1] <= tokens[at] - wanted):
            at -= 1
        taken.append(left.pop(at))
        tokens.pop(at)
    return taken


def ordered(items: Sequence[tuple[Row, ...]], order: LengthOrder) -> list[tuple[Row, ...]]:
    """Items of rows by their longest query: as they come, short ones first, long ones first, or by turns."""
    if order == "random":
        return list(items)
    ascending = sorted(items, key=lambda rows: max(row.query for row in rows))
    if order == "ascending":
        return ascending
    if order == "descending":
        return ascending[::-1]
    half = len(ascending) // 2
    short, long = ascending[:half], ascending[half:]
    return list(chain.from_iterable(_by_turns(short, long)))


def _by_turns(
    short: Sequence[tuple[Row, ...]], long: Sequence[tuple[Row, ...]]
) -> Iterator[Sequence[tuple[Row, ...]]]:
    yield from zip(short, long, strict=False)
    yield long[len(short) :]


def _quantile(values: Sequence[int], randomness: Random) -> int:
    percent = 100 * randomness.random()
    above = max(1, bisect_left(PERCENTS, percent))
    low, high = PERCENTS[above - 1], PERCENTS[above]
    return round(values[above - 1] + (values[above] - values[above - 1]) * (percent - low) / (high - low))
