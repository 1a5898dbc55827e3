"""Text to fill a trace with: documents of a file, and as many of their tokens as a workload needs.

The last tenth of a file is held out: it is what requests are made of, and nothing of it is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lemix.rows import read_bytes, read_rows
from lemix_common.errors import BadInput

HELD_OUT = 0.1
_MIN_DOCUMENTS = 2
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Texts:
    """The documents of a file, in two parts."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def read_texts(path: Path) -> Texts:
    """The documents of a file: a JSONL's rows (prompt and reference together), or a plain text's paragraphs."""
    documents = _rows(path) if path.suffix == ".jsonl" else _paragraphs(path)
    if len(documents) < _MIN_DOCUMENTS:
        raise BadInput(
            f"{path}: {len(documents)} documents; at least {_MIN_DOCUMENTS} rows or paragraphs are needed"
        )
    num_held_out = max(1, round(HELD_OUT * len(documents)))
    return Texts(tuple(documents[:-num_held_out]), tuple(documents[-num_held_out:]))


def take_tokens(
    documents: Sequence[str], num_tokens: int, encode: Encode, randomness: random.Random
) -> list[int]:
    """That many tokens of consecutive documents, from a random one on; past the last, from the first again."""
    start = randomness.randrange(len(documents))
    return _fill([*documents[start:], *documents[:start]], num_tokens, encode)


def _fill(documents: Iterable[str], num_tokens: int, encode: Encode) -> list[int]:
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= num_tokens:
            break
        tokens += encode(document)
    whole, rest = divmod(num_tokens, max(1, len(tokens)))
    return tokens * whole + tokens[:rest]


def _rows(path: Path) -> list[str]:
    return [f"{row.prompt}\n{row.reference}" for row in read_rows(path)]


def _paragraphs(path: Path) -> list[str]:
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not valid UTF-8 at byte {error.start}") from None
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
