"""A closed vocabulary of messages, read once from a union of frozen dataclasses.

`wire` (msgpack, between workers) and `fields` (text, on Redis streams) write the same messages in two ways.
What is allowed in them is said once, here: the classes of the union, each with exactly its fields, each value
of its annotation and bounded. Whoever breaks that gets a `ValueError` from here, and a `BadFrame` from the
two codecs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, get_args, get_type_hints

MAX_TEXT: Final = 65_536
"""Characters in one string."""
MAX_ENTRIES: Final = 4_096
"""Entries in one tuple."""

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # Python's strings hold them, UTF-8 doesn't


def _is_integer(value: object) -> bool:
    return type(value) is int and _INT64_MIN <= value <= _INT64_MAX  # no bool, which is an int too


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return False
    return value.isascii() or not _LONE_SURROGATE.search(value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_tuple_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and len(value) <= MAX_ENTRIES and all(map(fits, value))


_FITS: Final[Mapping[object, Callable[[object], bool]]] = {
    int: _is_integer,
    float: _is_number,
    str: _is_text,
    bool: _is_flag,
    tuple[int, ...]: _is_tuple_of(_is_integer),
    tuple[str, ...]: _is_tuple_of(_is_text),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One message class: its fields, and what fits into each."""

    kind: type
    annotations: Mapping[str, object]
    fits: tuple[tuple[str, Callable[[object], bool]], ...]
    tag: str
    """The class's name and a fingerprint of its fields: values in the fields' order are of this class and no other."""
    types: tuple[object, ...]
    read: Callable[[object], tuple[object, ...]]
    """A message's values, in the fields' order."""
    make: Callable[[Iterable[object]], object]
    """The message of right values, in the fields' order."""

    @classmethod
    def of(cls, kind: type) -> Shape:
        """Read a dataclass; a field that no codec could write is a `TypeError`, at import."""
        hints = get_type_hints(kind)
        annotations = {field.name: hints[field.name] for field in fields(kind)}
        for name, annotation in annotations.items():
            if annotation not in _FITS:
                raise TypeError(f"{kind.__name__}.{name}: messages can't carry {annotation}")
        said = ",".join(f"{name}:{annotation}" for name, annotation in annotations.items())
        return cls(
            kind,
            MappingProxyType(annotations),
            fits=tuple((name, _FITS[annotation]) for name, annotation in annotations.items()),
            tag=f"{kind.__name__}.{hashlib.sha256(said.encode()).hexdigest()[:6]}",
            types=tuple(annotations.values()),
            read=_reader(*annotations),
            make=_maker(kind, annotations),
        )

    def take_apart(self, message: object) -> dict[str, object]:
        """The message's values by name, each right."""
        values = self.read(message)
        self.check(values)
        return dict(zip(self.annotations, values, strict=True))

    def put_together(self, values: Mapping[str, object]) -> object:
        """A message from exactly its fields, each right."""
        if values.keys() != self.annotations.keys():
            differing = sorted(map(str, values.keys() ^ self.annotations.keys()))
            raise ValueError(f"{self.kind.__name__} lacks or doesn't have: {', '.join(differing)[:200]}")
        in_order = [values[name] for name in self.annotations]
        self.check(in_order)
        return self.make(in_order)

    def check(self, values: Sequence[object]) -> None:
        """`ValueError` unless these are as many values as there are fields, and each fits its own."""
        if len(values) != len(self.fits):
            raise ValueError(f"{self.kind.__name__} has {len(self.fits)} fields, not {len(values)}")
        for (name, fits), value in zip(self.fits, values, strict=True):
            if not fits(value):
                raise ValueError(f"{self.kind.__name__}.{name} can't be {value!r:.80}")


def _reader(*names: str) -> Callable[[Any], tuple[object, ...]]:
    """Gets all of these at once, which the operator module does for two and more."""
    match names:
        case ():
            return lambda _: ()
        case (name,):
            return lambda message: (getattr(message, name),)
        case _:
            return attrgetter(*names)


def _maker(kind: type, names: Iterable[str]) -> Callable[[Iterable[object]], object]:
    """What the class's own ``__init__`` does, in half its time: it would look each slot up by its name."""
    setters = [getattr(kind, name).__set__ for name in names]

    def make(values: Iterable[object]) -> object:
        message: object = object.__new__(kind)
        for set_value, value in zip(setters, values, strict=True):
            set_value(message, value)
        return message

    return make


def shapes_of(union: object) -> Mapping[str, Shape]:
    """The vocabulary's table: every class of the union by its name."""
    return MappingProxyType({kind.__name__: Shape.of(kind) for kind in get_args(union)})
