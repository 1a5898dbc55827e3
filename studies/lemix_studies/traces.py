"""Traces: when requests arrived somewhere, and how long they were. They carry no text.

Two layouts are read: Azure's CSV (``TIMESTAMP,ContextTokens,GeneratedTokens``) and Mooncake's JSONL (``timestamp`` in
milliseconds, ``input_length``, ``output_length``), whose arrivals are quantised to 3 s and therefore spread out again.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from lemix.rows import numbered_lines
from lemix_common.errors import BadInput

AZURE_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_QUANTUM_S = 3.0


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One request of a trace; its time is counted from the trace's first."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


def read_trace(path: Path, *, seed: int) -> list[TraceLine]:
    """Read a trace; an unreadable line is a `BadInput` naming file and line. ``seed`` spreads quantised arrivals."""
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    reader = readers.get(path.suffix)
    if reader is None:
        raise BadInput(f"{path}: not a trace (expected Azure's .csv or Mooncake's .jsonl)")
    lines = list(reader(path))
    if not lines:
        raise BadInput(f"{path}: no requests in it")
    first_s = lines[0].arrival_s
    counted = [TraceLine(line.arrival_s - first_s, line.input_tokens, line.output_tokens) for line in lines]
    return list(_spread(counted, random.Random(seed))) if path.suffix == ".jsonl" else counted


def _read_azure(path: Path) -> Iterator[TraceLine]:
    last_s = float("-inf")
    for number, line in numbered_lines(path):
        cells = next(csv.reader([line]))
        if number == 1:
            if tuple(cells) != AZURE_HEADER:
                raise BadInput(f"{path}:1: not Azure's header ({','.join(AZURE_HEADER)}): {line[:80]}")
            continue
        try:
            timestamp, context, generated = cells
            arrival_s = datetime.fromisoformat(timestamp).timestamp()
            read = TraceLine(arrival_s, int(context), int(generated))
        except ValueError:
            raise BadInput(f"{path}:{number}: not a time and two numbers of tokens: {line[:80]}") from None
        yield _checked(read, last_s, f"{path}:{number}")
        last_s = arrival_s


def _read_mooncake(path: Path) -> Iterator[TraceLine]:
    last_s = float("-inf")
    for number, line in numbered_lines(path):
        try:
            row: Any = json.loads(line)
            arrival_s = float(row["timestamp"]) / 1000
            read = TraceLine(arrival_s, int(row["input_length"]), int(row["output_length"]))
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"{path}:{number}: not an object with timestamp, input_length and output_length: {line[:80]}"
            ) from None
        yield _checked(read, last_s, f"{path}:{number}")
        last_s = arrival_s


def _checked(line: TraceLine, last_s: float, where: str) -> TraceLine:
    if line.arrival_s < last_s:
        raise BadInput(f"{where}: arrives before the line above it")
    if line.input_tokens < 0 or line.output_tokens < 0:
        raise BadInput(f"{where}: a negative number of tokens")
    return line


def _spread(lines: Iterable[TraceLine], randomness: random.Random) -> Iterator[TraceLine]:
    """Arrivals of one quantum, spread evenly at random over it, in their order."""
    for arrival_s, together in groupby(lines, key=lambda line: line.arrival_s):
        same = list(together)
        offsets = sorted(randomness.uniform(0, MOONCAKE_QUANTUM_S) for _ in same)
        for line, offset_s in zip(same, offsets, strict=True):
            yield TraceLine(arrival_s + offset_s, line.input_tokens, line.output_tokens)
