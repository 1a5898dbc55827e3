"""The wire: a worker's messages survive the way, and nothing else is understood."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, get_args, get_type_hints

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix_common._vocabulary import Shape, shapes_of
from lemix_common.errors import BadFrame
from lemix_common.messages import Frame, PlacementChanged, ReleaseItem
from lemix_common.wire import (
    ALIGNMENT,
    FRAMES,
    ITEM_BYTES,
    PRELUDE_BYTES,
    WIRE_VERSION,
    Codec,
    FrameLayout,
    Limits,
    Prelude,
    TensorBuffer,
)

TEXTS = st.text('aZ0 é😀\x00\n"\\')  # the whole of Unicode takes Hypothesis a second to load
INTEGERS = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: INTEGERS,
    float: st.floats(allow_nan=False),
    str: TEXTS,
    tuple[int, ...]: st.lists(INTEGERS, max_size=4).map(tuple),
    tuple[str, ...]: st.lists(TEXTS, max_size=4).map(tuple),
}


@dataclass(frozen=True, slots=True)
class Everything:
    """A field of every kind that messages have."""

    count: int
    share: float
    name: str
    is_on: bool
    nodes: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """A message that says all by its type."""


@dataclass(frozen=True, slots=True)
class Strange:
    """A message that can't be."""

    things: set[int]


Small = Everything | Nothing
SMALL: Codec[Small] = Codec(Small)
EXAMPLE = Everything(3, 0.5, "stage", is_on=True, nodes=(0, 2), names=("a", "é"))
SMALL_MESSAGES: st.SearchStrategy[Small] = st.just(Nothing()) | st.builds(
    Everything,
    INTEGERS,
    st.floats(allow_nan=False),
    TEXTS,
    st.booleans(),
    st.lists(INTEGERS, max_size=4).map(tuple),
    st.lists(TEXTS, max_size=4).map(tuple),
)
WORKER_FRAMES: st.SearchStrategy[Frame] = st.one_of(
    [
        st.builds(kind, **{field.name: VALUES[get_type_hints(kind)[field.name]] for field in fields(kind)})
        for kind in get_args(Frame)
    ]
)
RELEASE = ReleaseItem(node=0, stage=1, epoch=2, item="i", attempt=0)
quickly = settings(max_examples=40, deadline=None)


def packed(kind: str, values: object, version: object = WIRE_VERSION) -> bytes:
    """A message's bytes, right or wrong."""
    tags = {name: shape.tag for name, shape in shapes_of(Small).items()}
    payload: bytes = msgpack.packb((version, tags.get(kind, kind), values))
    return payload


def values_of(message: Everything) -> dict[str, object]:
    """The message's values by name, in order."""
    return {field.name: getattr(message, field.name) for field in fields(message)}


@given(WORKER_FRAMES)
@quickly
def test_what_workers_say_arrives_as_it_was_said(frame: Frame) -> None:
    """Every frame of the vocabulary, with any values, is read back equal and of the same type."""
    codec: Codec[Frame] = Codec(Frame)
    assert codec.decode(codec.encode(frame)) == frame


@given(SMALL_MESSAGES)
@quickly
def test_every_kind_of_field_arrives(message: Small) -> None:
    """Integers, numbers, texts, flags and tuples come back as what they were."""
    assert SMALL.decode(SMALL.encode(message)) == message


def test_an_integer_will_do_where_a_number_is_due() -> None:
    """``float`` takes an integer, as it does in Python."""
    message = replace(EXAMPLE, share=2)
    assert SMALL.decode(SMALL.encode(message)) == message


def test_a_message_cut_off_anywhere_is_refused() -> None:
    """No beginning of a message is a message, and none with something behind it is."""
    payload = SMALL.encode(EXAMPLE)
    for cut in range(len(payload)):
        with pytest.raises(BadFrame):
            SMALL.decode(payload[:cut])
    with pytest.raises(BadFrame):
        SMALL.decode(payload + b"\x00")


@given(SMALL_MESSAGES, st.data())
@quickly
def test_a_flipped_bit_raises_nothing_but_bad_frame(message: Small, data: st.DataObject) -> None:
    """Damage gives another message of the vocabulary or a `BadFrame`, never another error."""
    payload = bytearray(SMALL.encode(message))
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[bit // 8] ^= 1 << bit % 8
    with suppress(BadFrame):
        assert isinstance(SMALL.decode(bytes(payload)), Small)


@given(st.binary(max_size=80))
@quickly
def test_noise_raises_nothing_but_bad_frame(noise: bytes) -> None:
    """Bytes that nobody wrote as a message are refused as message, as prelude and as header."""
    with pytest.raises(BadFrame):
        SMALL.decode(noise)
    with pytest.raises(BadFrame):
        FRAMES.read_prelude(noise[:PRELUDE_BYTES].ljust(PRELUDE_BYTES, b"?"))
    with pytest.raises(BadFrame):
        FRAMES.read_header(Prelude(0, len(noise), 0), noise)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(packed("Everything2", ()), id="unknown type"),
        pytest.param(packed("Nothing.000000", ()), id="a type with other fields"),
        pytest.param(packed("Nothing", (), WIRE_VERSION + 1), id="other version"),
        pytest.param(packed("Nothing", (), "1"), id="version of another type"),
        pytest.param(packed("Nothing", {}), id="fields with names"),
        pytest.param(packed("Nothing", (1,)), id="unknown field"),
        pytest.param(packed("Everything", (*values_of(EXAMPLE).values(), 1)), id="one field more"),
        pytest.param(packed("Everything", (1,)), id="missing fields"),
        pytest.param(msgpack.packb((WIRE_VERSION, ["Nothing"], ())), id="a type that is no name"),
        pytest.param(msgpack.packb({"type": "Nothing"}), id="no message at all"),
        pytest.param(msgpack.packb(msgpack.ExtType(5, b"x")), id="an extension type"),
        pytest.param(b"\x91" * 5_000, id="nested deeply"),
    ],
)
def test_what_is_not_in_the_vocabulary_is_refused(payload: bytes) -> None:
    """The vocabulary is closed and versioned: an unknown type, version or field ends the conversation."""
    with pytest.raises(BadFrame):
        SMALL.decode(payload)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "3"),
        ("count", 3.0),
        ("count", True),
        ("count", None),
        ("count", 2**63),
        ("share", "0.5"),
        ("share", True),
        ("name", b"stage"),
        ("name", "x" * 65_537),
        ("is_on", 1),
        ("nodes", 0),
        ("nodes", (0, "1")),
        ("nodes", (0,) * 4_097),
        ("names", ("a", 1)),
        ("names", "ab"),
    ],
)
def test_a_value_of_another_type_or_over_its_bound_is_refused_at_both_ends(name: str, value: object) -> None:
    """A field holds what its annotation says, within bounds; the sender learns it before anything is sent."""
    values = values_of(EXAMPLE) | {name: value}
    with pytest.raises(BadFrame, match=name):
        SMALL.decode(packed("Everything", tuple(values.values())))
    with pytest.raises(BadFrame, match=name):
        SMALL.encode(Everything(**values))  # type: ignore[arg-type]


def test_a_text_that_utf8_cannot_say_is_refused() -> None:
    """Half a surrogate pair is a Python string but no text."""
    with pytest.raises(BadFrame):
        SMALL.encode(replace(EXAMPLE, name="\ud800"))


def test_a_message_of_another_vocabulary_is_refused() -> None:
    """What belongs on the control stream isn't sent between workers."""
    with pytest.raises(BadFrame, match="PlacementChanged"):
        FRAMES.encode(PlacementChanged(node=0, epoch=1))  # type: ignore[arg-type]


def test_a_bad_frame_keeps_the_first_64_bytes() -> None:
    """The log shows how the refused message began, and not more than that."""
    payload = packed("Unknown", ("A" * 100,))
    with pytest.raises(BadFrame) as caught:
        SMALL.decode(payload)
    assert repr(payload[:64]) in str(caught.value)
    assert repr(payload[:65])[:-1] not in str(caught.value)


def test_a_field_that_cannot_travel_is_noticed_when_the_codec_is_built() -> None:
    """A message class with, say, a set in it fails at import, not at its first use."""
    with pytest.raises(TypeError, match=r"Strange\.things"):
        Codec(Strange | Nothing)


def test_a_class_whose_fields_changed_is_another_class() -> None:
    """Values travel without names, so a tag stands for names and types: releases that differ don't mix them up."""

    @dataclass(frozen=True, slots=True)
    class Nothing:  # the same name, but
        count: int

    changed = Shape.of(Nothing)
    assert changed.tag != shapes_of(Small)["Nothing"].tag
    assert changed.tag.partition(".")[0] == "Nothing"


# ------------------------------------------------------------------------------------------------- frames


def tensor(dtype: str, *shape: int, fill: int = 7) -> TensorBuffer:
    """A tensor whose bytes are all alike."""
    return TensorBuffer(dtype, shape, memoryview(bytes([fill]) * (ITEM_BYTES[dtype] * prod(shape))))


TENSORS = st.builds(
    lambda dtype, shape, fill: tensor(dtype, *shape, fill=fill),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 255),
)


def head_and_payload(pieces: list[memoryview]) -> tuple[bytes, bytes, memoryview]:
    """Prelude, header and payload of a frame, as its receiver gets them."""
    head, *payload = map(bytes, pieces)
    return head[:PRELUDE_BYTES], head[PRELUDE_BYTES:], memoryview(b"".join(payload))


@given(st.lists(TENSORS, max_size=5))
@quickly
def test_tensors_lie_aligned_in_the_payload(tensors: list[TensorBuffer]) -> None:
    """Any tensors, empty ones too, come back with type, shape and bytes, each at a multiple of 64."""
    prelude_bytes, header_bytes, payload = head_and_payload(FRAMES.encode(RELEASE, tensors))
    prelude = FRAMES.read_prelude(prelude_bytes)
    header = FRAMES.read_header(prelude, header_bytes)
    assert header.message == RELEASE
    assert list(header.tensors(payload)) == tensors
    assert all(place.start % ALIGNMENT == 0 for place in header.places)
    assert prelude == Prelude(len(tensors), len(header_bytes), len(payload))


def test_a_frame_is_made_of_the_tensors_own_memory() -> None:
    """No tensor is copied on its way out."""
    memory = bytearray(64)
    floats: memoryview[Any] = memoryview(memory).cast("f", (4, 4))
    pieces = FRAMES.encode(RELEASE, [TensorBuffer("float32", (4, 4), floats)])
    assert pieces[-1].obj is memory


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(TensorBuffer("float32", (3,), memoryview(bytes(13))), id="not type times shape"),
        pytest.param(TensorBuffer("complex64", (1,), memoryview(bytes(8))), id="unknown type"),
        pytest.param(TensorBuffer("uint8", (-1, -4), memoryview(bytes(4))), id="negative lengths"),
        pytest.param(TensorBuffer("uint8", (1,) * 9, memoryview(bytes(1))), id="nine dimensions"),
        pytest.param(TensorBuffer("uint8", (0, 2**40), memoryview(b"")), id="empty, but of an absurd shape"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_not_sent(wrong: TensorBuffer) -> None:
    """Size must be type times shape, and shapes are limited; the sender's own mistake is refused at home."""
    with pytest.raises(BadFrame):
        FRAMES.encode(RELEASE, [wrong])


@pytest.mark.parametrize(
    "table",
    [
        [["uint8", [4], 5]],
        [["uint8", [2**62, 0], 0]],
        [["uint8", [True], 1]],
        [["uint8", 4, 4]],
        [["uint8", "4", 4]],
        [[["uint8"], [4], 4]],
        [["float128", [1], 16]],
        [["uint8", [1] * 9, 1]],
        [["uint8", [4]]],
        "table",
        None,
        4,
    ],
    ids=repr,
)
def test_a_header_that_lies_about_a_tensor_is_refused(table: object) -> None:
    """A receiver trusts no size: it is refused before any memory is taken for it."""
    header = msgpack.packb((FRAMES.codec.encode(RELEASE), table))
    with pytest.raises(BadFrame):
        FRAMES.read_header(Prelude(1, len(header), 4), header)


def test_a_header_must_agree_with_its_prelude() -> None:
    """Number of tensors and payload size are said twice, and alike."""
    prelude_bytes, header, _ = head_and_payload(FRAMES.encode(RELEASE, [tensor("uint8", 4)]))
    prelude = FRAMES.read_prelude(prelude_bytes)
    for wrong in (prelude._replace(num_tensors=2), prelude._replace(payload_bytes=68)):
        with pytest.raises(BadFrame, match="prelude"):
            FRAMES.read_header(wrong, header)


def test_limits_hold_for_what_is_sent_and_what_is_announced() -> None:
    """Header, number of tensors and payload each have a limit, at both ends."""
    roomy: FrameLayout[Frame] = FrameLayout(Codec(Frame), Limits())
    tensors = [tensor("uint8", 100), tensor("uint8", 100)]
    prelude = bytes(roomy.encode(RELEASE, tensors)[0][:PRELUDE_BYTES])
    for limits in (Limits(header_bytes=50), Limits(num_tensors=1), Limits(payload_bytes=200)):
        narrow: FrameLayout[Frame] = FrameLayout(Codec(Frame), limits)
        with pytest.raises(BadFrame, match="limits"):
            narrow.encode(RELEASE, tensors)
        with pytest.raises(BadFrame, match="limits"):
            narrow.read_prelude(prelude)


def test_a_prelude_of_something_else_is_refused() -> None:
    """Another protocol's first bytes, and another wire version, each say so."""
    prelude = bytearray(FRAMES.encode(RELEASE)[0][:PRELUDE_BYTES])
    prelude[4] += 1
    with pytest.raises(BadFrame, match=f"wire version {WIRE_VERSION + 1}"):
        FRAMES.read_prelude(bytes(prelude))
    with pytest.raises(BadFrame, match="not a LeMix frame"):
        FRAMES.read_prelude(b"GET / HTTP/1.1\r\nHost")
