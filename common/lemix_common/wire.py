"""What workers say to each other, as bytes: a closed codec of messages and the layout of a frame.

A frame is three parts in a row::

    prelude   20 bytes: magic, wire version, number of tensors, header bytes, payload bytes
    header    msgpack: the message, then dtype, shape and size of every tensor
    payload   the tensors' raw bytes, each beginning at a multiple of 64 (zeros between)

so that the tensors lie on the wire as they will lie in the receiver's memory: one read fills one aligned
buffer, and nothing is copied after it. Everything a header says is checked before a byte of the payload is
waited for. Nothing in a frame can name code; what isn't in the vocabulary is a `BadFrame`, which keeps the
first bytes for the log.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Final, Generic, NamedTuple, TypeVar, cast

import msgpack  # type: ignore[import-untyped]

from lemix_common._vocabulary import MAX_TEXT, shapes_of
from lemix_common.errors import BadFrame
from lemix_common.messages import Frame

WIRE_VERSION: Final = 1
ALIGNMENT: Final = 64
"""Bytes; every tensor begins at a multiple of it, on the wire and in memory."""

ITEM_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
"""The element types that tensors on the wire can have, by the name torch and numpy give them."""

_MAGIC: Final = b"LeMx"
_PRELUDE: Final = struct.Struct("<4sHHIQ")
PRELUDE_BYTES: Final = _PRELUDE.size
_ZEROS: Final = memoryview(bytes(ALIGNMENT))
_LARGE_INTEGER: Final = b"\xcf"
"""msgpack's mark of an integer beyond 32 bits."""
_SHORT_PAIR: Final = b"\x92\xc4"
"""How msgpack begins a pair whose first is up to 255 bytes; their number follows."""
_REMEMBERED: Final = 4_096
"""Layouts; a worker sees the same few again and again."""
_REMEMBERED_BYTES: Final = 256
"""Of a packed table of tensors; a longer one is read each time."""

_pack: Final = msgpack.Packer().pack

M = TypeVar("M")


def _bad(reason: object, payload: bytes | memoryview) -> BadFrame:
    return BadFrame(f"{reason}; it began {bytes(payload[:64])!r}")


class Codec(Generic[M]):
    """Messages of one closed union as bytes: wire version, tag, values in order; anything else is a `BadFrame`.

    The tag stands for a class with exactly its fields. Every hop pays for this twice, so values are looked at one by
    one only where a glance shows that it may be needed: at their types, and at their bytes, which are few and without
    `_LARGE_INTEGER` unless some text is long or some integer is beyond 32 bits.
    """

    def __init__(self, union: object) -> None:
        self._shapes = shapes_of(union)
        self._by_tag = {shape.tag: shape for shape in self._shapes.values()}

    def encode(self, message: M) -> bytes:
        """The message as bytes; one that its receiver would refuse is refused here."""
        shape = self._shapes.get(type(message).__name__)
        if shape is None:
            raise BadFrame(f"{type(message).__name__} is not in this vocabulary")
        values = shape.read(message)
        try:
            if tuple(map(type, values)) != shape.types:
                shape.check(values)
            payload: bytes = _pack((WIRE_VERSION, shape.tag, values))
            if _LARGE_INTEGER in payload or len(payload) > MAX_TEXT:
                shape.check(values)
        except (ValueError, OverflowError) as error:
            raise BadFrame(str(error)) from error
        return payload

    def decode(self, payload: bytes | memoryview) -> M:
        """The message that these bytes are."""
        payload = bytes(payload)
        try:
            version, tag, values = msgpack.unpackb(payload, use_list=False)
            shape = self._by_tag.get(tag)
            if version != WIRE_VERSION or shape is None or not isinstance(values, tuple):
                raise _bad(f"not a message of wire version {WIRE_VERSION}, or of an unknown type", payload)
            if (
                tuple(map(type, values)) != shape.types
                or _LARGE_INTEGER in payload
                or len(payload) > MAX_TEXT
            ):
                shape.check(values)
            return cast("M", shape.make(values))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise _bad(error, payload) from error


@dataclass(frozen=True, slots=True)
class TensorBuffer:
    """A tensor without its library: element type, shape, and a view of its bytes, contiguous and row-major.

    Going out, any contiguous view will do; coming in, it is a flat, writable, 64-byte-aligned view of a
    pooled buffer.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one frame may be at most."""

    header_bytes: int = 2**18
    payload_bytes: int = 2**33
    num_tensors: int = 4_096
    num_dimensions: int = 8


class Prelude(NamedTuple):
    """How much follows."""

    num_tensors: int
    header_bytes: int
    payload_bytes: int


class TensorPlace(NamedTuple):
    """Where a tensor lies in its frame's payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple, Generic[M]):
    """A frame without its payload."""

    message: M
    places: tuple[TensorPlace, ...]

    def tensors(self, payload: memoryview) -> tuple[TensorBuffer, ...]:
        """Views of the tensors in the payload."""
        return tuple([TensorBuffer(dtype, shape, payload[a:b]) for dtype, shape, a, b in self.places])


class _Table(NamedTuple):
    """What a frame says of its tensors, and where they lie."""

    packed: bytes
    places: tuple[TensorPlace, ...]
    payload_bytes: int


class FrameLayout(Generic[M]):
    """Frames of one vocabulary, within limits."""

    def __init__(self, codec: Codec[M], limits: Limits) -> None:
        self.codec = codec
        self._limits = limits
        self._packed_table = lru_cache(_REMEMBERED)(self._pack_table)
        self._read_short_table = lru_cache(_REMEMBERED)(self._read_table)

    def encode(self, message: M, tensors: Sequence[TensorBuffer] = ()) -> list[memoryview]:
        """The pieces of the frame in order, no tensor copied: prelude and header first, then the payload."""
        try:
            packed, places, payload_bytes = self._packed_table(
                tuple([(tensor.dtype, tensor.shape, tensor.data.nbytes) for tensor in tensors])
            )
        except ValueError as error:
            raise BadFrame(str(error)) from error
        header = _packed_pair(self.codec.encode(message), packed)
        prelude = self._within_limits(Prelude(len(places), len(header), payload_bytes))
        head = memoryview(_PRELUDE.pack(_MAGIC, WIRE_VERSION, *prelude) + header)
        return [head, *_payload_pieces(places, tensors)]

    def read_prelude(self, prelude: bytes | memoryview) -> Prelude:
        """What follows these `PRELUDE_BYTES` bytes, if they begin a frame within the limits."""
        magic, version, num_tensors, header_bytes, payload_bytes = _PRELUDE.unpack(prelude)
        if magic != _MAGIC:
            raise _bad("not a LeMix frame", prelude)
        if version != WIRE_VERSION:
            raise _bad(f"wire version {version}, this worker speaks {WIRE_VERSION}", prelude)
        return self._within_limits(Prelude(num_tensors, header_bytes, payload_bytes))

    def read_header(self, prelude: Prelude, header: bytes | memoryview) -> Header[M]:
        """The message, and where each tensor will be in the payload that the prelude announced."""
        try:
            message, packed = _split_pair(bytes(header))
            is_short = len(packed) <= _REMEMBERED_BYTES
            _, places, payload_bytes = (
                self._read_short_table(packed) if is_short else self._read_table(packed)
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise _bad(error, header) from error
        if (len(places), payload_bytes) != (prelude.num_tensors, prelude.payload_bytes):
            raise _bad("a header that doesn't agree with its prelude", header)
        return Header(self.codec.decode(message), places)

    def _pack_table(self, table: tuple[tuple[str, tuple[int, ...], int], ...]) -> _Table:
        places = _places(table, self._limits)
        return _Table(msgpack.packb(table), places, _end(places))

    def _read_table(self, packed: bytes) -> _Table:
        places = _places(msgpack.unpackb(packed, use_list=False), self._limits)
        return _Table(packed, places, _end(places))

    def _within_limits(self, prelude: Prelude) -> Prelude:
        limits = self._limits
        if (
            prelude.num_tensors > limits.num_tensors
            or prelude.header_bytes > limits.header_bytes
            or prelude.payload_bytes > limits.payload_bytes
        ):
            raise BadFrame(f"{prelude} is over the limits: {limits}")
        return prelude


def _packed_pair(message: bytes, table: bytes) -> bytes:
    """The pair of a message's bytes and a table, which is packed already."""
    if len(message) < 2**8:
        return b"%b%c%b%b" % (_SHORT_PAIR, len(message), message, table)
    return cast("bytes", _SHORT_PAIR[:1] + msgpack.packb(message) + table)


def _split_pair(header: bytes) -> tuple[bytes, bytes]:
    """The message's bytes and the packed table."""
    if header[:2] == _SHORT_PAIR and len(header) > 2:
        end = 3 + header[2]
        return header[3:end], header[end:]
    message, table = msgpack.unpackb(header, use_list=False)
    return message, msgpack.packb(table)


def _places(table: Iterable[tuple[str, tuple[int, ...], int]], limits: Limits) -> tuple[TensorPlace, ...]:
    """Where tensors of these types, shapes and sizes lie; `ValueError` if a size isn't type times shape."""
    places: list[TensorPlace] = []
    end = 0
    for dtype, shape, num_bytes in table:
        if len(shape) > limits.num_dimensions:
            raise ValueError(f"a tensor of {len(shape)} dimensions, the limit is {limits.num_dimensions}")
        for length in shape:
            if type(length) is not int or not 0 <= length <= limits.payload_bytes:
                raise ValueError(f"a tensor of length {length!r:.40} in one dimension")
        if dtype not in ITEM_BYTES or ITEM_BYTES[dtype] * prod(shape) != num_bytes:
            raise ValueError(f"a {dtype!r:.40} tensor of shape {shape!r:.80} and {num_bytes!r:.40} bytes")
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + num_bytes
        places.append(TensorPlace(dtype, shape, start, end))
    return tuple(places)


def _end(places: Sequence[TensorPlace]) -> int:
    return places[-1].end if places else 0


def _payload_pieces(places: Sequence[TensorPlace], tensors: Sequence[TensorBuffer]) -> Iterator[memoryview]:
    end = 0
    for place, tensor in zip(places, tensors, strict=True):
        if place.start > end:
            yield _ZEROS[: place.start - end]
        if place.end > place.start:
            yield tensor.data.cast("B")
        end = place.end


FRAMES: Final[FrameLayout[Frame]] = FrameLayout(Codec(Frame), Limits())
"""Between workers that know each other."""
