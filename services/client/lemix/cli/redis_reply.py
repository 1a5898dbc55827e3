"""A broker's reply as redis-cli shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def show(reply: object) -> str:
    """The reply as lines of text."""
    return "\n".join(_lines(reply))


def _lines(reply: object) -> Iterator[str]:
    match reply:
        case None:
            yield "(nil)"
        case bool() | int():
            yield f"(integer) {int(reply)}"
        case bytes():
            yield reply.decode("utf-8", "backslashreplace")
        case Mapping():
            yield from _numbered([part for pair in reply.items() for part in pair])
        case list() | tuple() | set() | frozenset():
            yield from _numbered(list(reply))
        case _:
            yield str(reply)


def _numbered(replies: list[object]) -> Iterator[str]:
    if not replies:
        yield "(empty)"
    for number, reply in enumerate(replies, start=1):
        label = f"{number}) ".rjust(len(str(len(replies))) + 2)
        for i, line in enumerate(_lines(reply)):
            yield (" " * len(label) if i else label) + line
