"""A schedule as a picture of characters: time to the right, a line a worker."""

from __future__ import annotations

from collections.abc import Iterator

from lemix_common.schedules.action import Schedule
from lemix_common.schedules.timing import Span, simulate

IDLE = "."


def grid(schedule: Schedule, *, width: int = 0) -> str:
    """Every action at its time, in units: ``F0`` takes one, ``B0---`` two, a dot is an idle one.

    Actions name their stage where a worker has several: ``2F0``. A picture wider than ``width`` characters (0: no
    limit) is cut into bands, one below the other.

    >>> from lemix_common.schedules.orders import gpipe
    >>> print(grid(gpipe(2, 2)))
    time     0  1  2  3  4  5  6  7  8
    stage 0  F0 F1 .  .  .  B0--- B1---
    stage 1  .  F0 F1 B0--- B1--- .  .
    """
    timing, hosted = simulate(schedule), schedule.hosted()
    short = all(len(stages) == 1 for stages in hosted)
    names = ["time", *(_name(stages) for stages in hosted)]
    margin = max(map(len, names)) + 2
    slots = round(timing.makespan)
    cell = 1 + max(
        len(str(slots - 1)), *(len(_label(span, short)) for spans in timing.spans for span in spans)
    )
    lines = [
        "".join(str(slot).ljust(cell) for slot in range(slots)),
        *("".join(_cells(spans, slots, cell, short=short)) for spans in timing.spans),
    ]
    band = max(1, (width - margin) // cell) * cell if width else slots * cell
    return "\n\n".join(
        "\n".join(
            f"{name:<{margin}}{line[start : start + band]}".rstrip()
            for name, line in zip(names, lines, strict=True)
        )
        for start in range(0, slots * cell, band)
    )


def _cells(spans: tuple[Span, ...], slots: int, cell: int, *, short: bool) -> Iterator[str]:
    now = 0
    for span in spans:
        start, end = round(span.start), round(span.end)
        yield IDLE.ljust(cell) * (start - now)
        label = _label(span, short)
        yield f"{label}{'-' * ((end - start - 1) * cell)}".ljust((end - start) * cell)
        now = end
    yield IDLE.ljust(cell) * (slots - now)


def _label(span: Span, short: bool) -> str:
    return f"{span.action.work}{span.action.microbatch}" if short else str(span.action)


def _name(stages: tuple[int, ...]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {','.join(map(str, stages))}"
