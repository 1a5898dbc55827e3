"""The page of guarantees names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fences import ROOT

GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_proof_exists() -> None:
    """A guarantee whose test was renamed or removed is no guarantee."""
    missing = [f"{file}::{test}" for file, test in NAMED.findall(GUARANTEES) if not exists(ROOT / file, test)]
    assert NAMED.search(GUARANTEES)
    assert not missing, missing


def test_every_guarantee_has_a_proof() -> None:
    """No row of a table of promises is without a test."""
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ") and "| promise |" not in line]
    assert len(rows) > 10
    assert not [row for row in rows if not NAMED.search(row)]


def exists(file: Path, test: str) -> bool:
    """Whether the file defines the test."""
    return file.exists() and any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == test
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
    )
