"""Stages' time as rows of letters, a second each, so that a test is a picture.

In what is drawn, digits are a request's pieces, lower case letters a microbatch's forward, upper case its backward,
``#`` the optimizer; all letters are of one step. In what is read back, ``s`` is serving and ``p`` pipeline idleness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from lemix_studies.idleness import idle_pieces
from lemix_studies.pieces import IDLE_PIPELINE, Piece

STEP = "main:1"


def drawn(*rows: str, node: int = 0, workers: Sequence[str] = ()) -> list[Piece]:
    """The pieces of some rows, the last row being stage 0; by default each stage has a worker of its own."""
    return [
        piece
        for stage, row in enumerate(reversed(rows))
        for piece in _row(row, node, stage, workers[stage] if workers else f"worker-{node}-{stage}")
    ]


def idle_rows(pieces: Sequence[Piece], *, stages: int, seconds: int, node: int = 0) -> list[str]:
    """The idleness of a node's stages, stage 0 last; ``.`` is where there is none."""
    positions = [(node, stage) for stage in reversed(range(stages))]
    idle = idle_pieces(pieces, positions, (0.0, float(seconds)))
    return [_letters([piece for piece in idle if piece.position == at], seconds) for at in positions]


def _row(row: str, node: int, stage: int, worker: str) -> Iterable[Piece]:
    second = 0
    for letter, repeated in groupby(row):
        start, second = second, second + len(list(repeated))
        if letter == ".":
            continue
        category, item, unit = _work(letter)
        yield Piece(
            node=node,
            stage=stage,
            category=category,
            start=float(start),
            end=float(second),
            worker=worker,
            item=item,
            unit=unit,
            version="0.0",
        )


def _work(letter: str) -> tuple[str, str, str]:
    if letter.isdigit():
        return "prefill", f"r-{letter}", f"r-{letter}"
    if letter == "#":
        return "optimizer", STEP, STEP
    return "training_forward" if letter.islower() else "training_backward", f"t-{letter.lower()}", STEP


def _letters(idle: Sequence[Piece], seconds: int) -> str:
    def at(second: int) -> str:
        for piece in idle:
            if piece.start <= second < piece.end:
                return "p" if piece.category == IDLE_PIPELINE else "s"
        return "."

    return "".join(map(at, range(seconds)))
