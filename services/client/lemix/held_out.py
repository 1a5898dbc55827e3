"""The held-out examples of a cluster's gate: read and tokenized at the border, before anything starts."""

from __future__ import annotations

from pathlib import Path

from lemix.items import ScoreItem
from lemix.model_folder import ModelFolder
from lemix.preparation import prepare
from lemix.rows import read_rows
from lemix.tokenization import ModelCard, open_tokenization
from lemix_common.errors import BadInput

MOST_ROWS = 1000
"""All are scored before each version is served, and kept in the broker."""

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of a prompt and its reference."""


def read_held_out(path: str, model: ModelFolder) -> list[Pair]:
    """The examples of a JSONL file ('': none); `BadInput` names the first line that can't be used."""
    if not path:
        return []
    rows = read_rows(Path(path))
    if len(rows) > MOST_ROWS:
        raise BadInput(f"{path}: {len(rows)} rows, all scored before each version: give {MOST_ROWS} at most")
    fields = {name: str(value) for name, value in model.fields().items()}
    tokenization = open_tokenization(ModelCard.parse(fields), model.tokenizer)
    pairs = []
    for row in rows:
        try:
            (prepared,) = prepare(ScoreItem(row.prompt, row.reference), tokenization)
        except BadInput as error:
            raise type(error)(f"{row.where}: {error}") from None
        pairs.append((prepared.payload["prompt"], prepared.payload["reference"]))
    return pairs
