"""`lemix redis` shows replies as redis-cli does."""

from __future__ import annotations

import pytest

from lemix.cli.redis_reply import show


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (None, "(nil)"),
        (3, "(integer) 3"),
        ("OK", "OK"),
        (b"\xff", "\\xff"),
        ([], "(empty)"),
        ({"state": "running"}, "1) state\n2) running"),
        ([["1-0", ["item", "a"]], "x"], "1) 1) 1-0\n   2) 1) item\n      2) a\n2) x"),
    ],
)
def test_replies(reply: object, shown: str) -> None:
    """Numbers are marked, lists are numbered, hashes are field and value in turn."""
    assert show(reply) == shown
