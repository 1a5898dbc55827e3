"""points.jsonl: a line a finished point, written before the next begins, so that a killed study can go on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lemix_common.errors import BadInput
from lemix_studies.experiments.settings import FIELDS, key_of

JOURNAL: Final = "points.jsonl"
TABLE: Final = "points.csv"

Row = dict[str, Any]


class Journal:
    """The finished points of a report."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL

    def begin(self, *, resumes: bool) -> dict[str, Row]:
        """The rows there are, by their points' keys; none, and an empty file, unless the study is resumed.

        A last line that a kill cut off is dropped; any other that is no point is `BadInput`.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not resumes or not self._path.exists():
            self._path.write_text("", encoding="utf-8")
            return {}
        text = self._path.read_text("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        rows = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                raise BadInput(
                    f"{self._path}:{number}: not a point of this version; study anew without --resume"
                ) from None
        if whole != text:
            with self._path.open("r+b") as file:
                file.truncate(len(whole.encode("utf-8")))
        return rows

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows; they are on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def write_table(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """points.csv: a line a point, what is nested by names with an underscore (`response_s_p95`)."""
    flat = [flattened(row) for row in rows]
    columns = dict.fromkeys([*FIELDS, *(name for row in flat for name in row)])
    with (directory / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows(flat)


def flattened(row: Mapping[str, Any]) -> Row:
    """One level of names; lists are left out."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{key}": inner for key, inner in value.items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat
