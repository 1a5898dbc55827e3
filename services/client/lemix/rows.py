"""Training rows in JSONL files, and what they mean: `prompt` and `reference`, under any of their usual names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemix_common.errors import BadInput

KNOWN_ROWS = "prompt and reference, question and answer, or instruction (and input) and output"


@dataclass(frozen=True, slots=True)
class Row:
    """What to say before, what to learn to say, and where that was read."""

    prompt: str
    reference: str
    where: str


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; the first line that can't be read is a `BadInput` naming file and line."""
    rows = [row for number, line in numbered_lines(path) for row in _rows(line, f"{path}:{number}")]
    if not rows:
        raise BadInput(f"{path}: no rows in it (expected one JSON object a line with {KNOWN_ROWS})")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """A text file's lines that aren't blank, with their numbers from 1."""
    for number, raw in enumerate(read_bytes(path).split(b"\n"), start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}:{number}: not valid UTF-8 at byte {error.start} of the line") from None
        if line.strip():
            yield number, line.rstrip("\r")


def read_bytes(path: Path) -> bytes:
    """A file's content, or a `BadInput` naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from None


def _rows(line: str, where: str) -> Iterator[Row]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: not a JSON object with {KNOWN_ROWS}")
    for prompt, reference in _pairs(row, where):
        if not (isinstance(prompt, str) and isinstance(reference, str)):
            raise BadInput(f"{where}: prompt and reference must be texts")
        yield Row(prompt, reference, where)


def _pairs(row: Mapping[str, Any], where: str) -> Iterator[tuple[object, object]]:
    match row:
        case {"prompt": prompt, "reference": reference} | {"question": prompt, "answer": reference}:
            yield prompt, reference
        case {"instruction": str(instruction), "output": output}:
            yield _instructed(instruction, row), output
        case {"instruction": str(instruction), "instances": [*instances]} if instances:
            for instance in instances:
                if not (isinstance(instance, Mapping) and "output" in instance):
                    raise BadInput(f"{where}: an instance has no output")
                yield _instructed(instruction, instance), instance["output"]
        case _:
            raise BadInput(f"{where}: expected {KNOWN_ROWS}, got {', '.join(map(str, row)) or 'nothing'}")


def _instructed(instruction: str, row: Mapping[str, Any]) -> str:
    given = row.get("input")
    return f"{instruction}\n{given}" if given else instruction
