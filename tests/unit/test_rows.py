from __future__ import annotations

from pathlib import Path

import pytest

from lemix.rows import read_rows
from lemix_common.errors import BadInput


def written(directory: Path, *lines: str) -> Path:
    """A file of these lines."""
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "pairs"),
    [
        ('{"prompt": "p", "reference": "r", "id": 7}', [("p", "r")]),
        ('{"question": "p", "answer": "r"}', [("p", "r")]),
        ('{"instruction": "p", "output": "r"}', [("p", "r")]),
        ('{"instruction": "p", "input": "q", "output": "r"}', [("p\nq", "r")]),
        (
            '{"instruction": "p", "instances": [{"input": "", "output": "r"}, {"output": "s"}]}',
            [("p", "r"), ("p", "s")],
        ),
    ],
)
def test_the_usual_names_are_known(tmp_path: Path, line: str, pairs: list[tuple[str, str]]) -> None:
    """Each way of writing a row gives prompt and reference."""
    assert [(row.prompt, row.reference) for row in read_rows(written(tmp_path, line))] == pairs


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    """Blank lines count, but are no rows."""
    path = written(tmp_path, "", '{"prompt": "p", "reference": "r"}', "")
    assert [row.where for row in read_rows(path)] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"prompt": "p"}', "expected prompt and reference"),
        ('{"prompt": 1, "reference": "r"}', "prompt and reference must be texts"),
        ('{"instruction": "p", "instances": [{}]}', "an instance has no output"),
        ('{"instruction": "p", "instances": []}', "expected prompt and reference"),
    ],
)
def test_an_unreadable_row_is_named(tmp_path: Path, line: str, reason: str) -> None:
    """File, line and what is wrong with it."""
    path = written(tmp_path, '{"prompt": "p", "reference": "r"}', line)
    with pytest.raises(BadInput, match=rf"rows\.jsonl:2: {reason}"):
        read_rows(path)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    """There would be nothing to do."""
    with pytest.raises(BadInput, match="no rows in it"):
        read_rows(written(tmp_path, ""))
