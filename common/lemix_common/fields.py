"""Notices as the flat, readable fields of a Redis stream entry, and back.

An operator reads them with ``XRANGE``: the type, then each field in plain text, tuples as JSON lists. The
vocabulary is as closed as the workers' (`wire`): what isn't exactly one of its messages is a `BadFrame`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, cast

from lemix_common._vocabulary import Shape, shapes_of
from lemix_common.errors import BadFrame
from lemix_common.messages import Notice

_TYPE: Final = "type"
_SHAPES: Final = shapes_of(Notice)
_INTEGER: Final = re.compile(r"-?[0-9]{1,19}")
_FLAGS: Final = {"true": True, "false": False}


def to_fields(notice: Notice) -> dict[str, str]:
    """The notice as stream fields."""
    try:
        shape = _shape(type(notice).__name__)
        values = shape.take_apart(notice)
    except ValueError as error:
        raise BadFrame(str(error)) from error
    texts = {name: _TEXTS[annotation].write(values[name]) for name, annotation in shape.annotations.items()}
    return {_TYPE: shape.kind.__name__, **texts}


def from_fields(entry: Mapping[bytes, bytes] | Mapping[str, str]) -> Notice:
    """The notice that these stream fields are, as redis-py returns them with or without decoding."""
    try:
        texts = {_decoded(name): _decoded(text) for name, text in entry.items()}
        shape = _shape(texts.pop(_TYPE, ""))
        return cast("Notice", shape.put_together({name: _read(shape, name, texts[name]) for name in texts}))
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"{error}; it began {repr(dict(entry))[:64]}") from error


def _shape(name: str) -> Shape:
    if name not in _SHAPES:
        raise ValueError(f"{name!r:.80} is not a notice")
    return _SHAPES[name]


def _read(shape: Shape, name: str, text: str) -> object:
    """The value that the text is; that of an unknown field is the text, for the vocabulary to refuse."""
    return _TEXTS[shape.annotations.get(name, str)].read(text)


def _decoded(text: bytes | str) -> str:
    return text.decode() if isinstance(text, bytes) else text


class _Text(NamedTuple):
    """How values of one annotation are written and read; the vocabulary checks whether they are right."""

    write: Callable[[object], str]
    read: Callable[[str], object]


def _write_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r:.80} is no integer")
    return int(text)


def _read_tuple(text: str) -> tuple[object, ...]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"{text!r:.80} is no list")  # noqa: TRY004 - a wrong text, not a wrong argument
    return tuple(entries)


_TEXTS: Final[Mapping[object, _Text]] = {
    int: _Text(str, _read_integer),
    float: _Text(str, float),
    str: _Text(str, str),
    bool: _Text(_write_json, _FLAGS.get),
    tuple[int, ...]: _Text(_write_json, _read_tuple),
    tuple[str, ...]: _Text(_write_json, _read_tuple),
}
