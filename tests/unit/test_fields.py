"""Notices on the control stream: readable by an operator, closed to everything else."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix_common.errors import BadFrame
from lemix_common.fields import from_fields, to_fields
from lemix_common.messages import ForwardFailed, LinkLost, Notice, RunStep

TEXTS = st.text('aZ0 é😀\x00\n"\\')  # the whole of Unicode takes Hypothesis a second to load
INTEGERS = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: INTEGERS,
    str: TEXTS,
    float: st.floats(allow_nan=False),  # equal to nothing, not even to itself
    tuple[int, ...]: st.lists(INTEGERS, max_size=4).map(tuple),
}
NOTICES: st.SearchStrategy[Notice] = st.one_of(
    [
        st.builds(kind, **{field.name: VALUES[get_type_hints(kind)[field.name]] for field in fields(kind)})
        for kind in get_args(Notice)
    ]
)
STEP = RunStep(
    run="r", step=7, attempt=1, lineage=0, weights=6, shard_nodes=(0, 1), members=(), epochs=(3, 3)
)
quickly = settings(max_examples=40, deadline=None)


def test_an_operator_can_read_a_notice() -> None:
    """The type comes first, then plain text; tuples are JSON lists."""
    assert list(to_fields(STEP).items()) == [
        ("type", "RunStep"),
        ("run", "r"),
        ("step", "7"),
        ("attempt", "1"),
        ("lineage", "0"),
        ("weights", "6"),
        ("shard_nodes", "[0, 1]"),
        ("members", "[]"),
        ("epochs", "[3, 3]"),
    ]


@given(NOTICES)
@quickly
def test_a_notice_comes_back_as_it_was(notice: Notice) -> None:
    """Every notice of the vocabulary is read back equal, from text and from bytes alike."""
    entry = to_fields(notice)
    assert from_fields(entry) == notice
    assert from_fields({name.encode(): text.encode() for name, text in entry.items()}) == notice


@given(NOTICES, st.data())
@quickly
def test_damage_raises_nothing_but_bad_frame(notice: Notice, data: st.DataObject) -> None:
    """A bit flipped in any name or text gives another notice or a `BadFrame`, never another error."""
    entry = {name.encode(): bytearray(text.encode()) for name, text in to_fields(notice).items()}
    text = data.draw(st.sampled_from([text for text in entry.values() if text]))
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    text[bit // 8] ^= 1 << bit % 8
    with suppress(BadFrame):
        assert isinstance(from_fields({name: bytes(text) for name, text in entry.items()}), Notice)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("type", "ForwardFailed"),
        ("type", "Frame"),
        ("type", ""),
        ("step", ""),
        ("step", "7.0"),
        ("step", " 7"),
        ("step", "1_000"),
        ("step", "9223372036854775808"),
        ("step", "9" * 5_000),
        ("run", "x" * 65_537),
        ("members", ""),
        ("members", "0"),
        ("members", "{}"),
        ("members", '["0"]'),
        ("members", "[0.5]"),
        ("members", "[true]"),
        ("members", "[" * 10_000),
        ("extra", "1"),
    ],
)
def test_a_wrong_field_is_refused(name: str, text: str) -> None:
    """An unknown type or field, or a text that isn't its field's, is a `BadFrame`."""
    with pytest.raises(BadFrame):
        from_fields(to_fields(STEP) | {name: text})


@pytest.mark.parametrize("missing", ["type", "run", "epochs"])
def test_a_missing_field_is_refused(missing: str) -> None:
    """No field has a default on the stream."""
    entry = to_fields(STEP)
    del entry[missing]
    with pytest.raises(BadFrame):
        from_fields(entry)


def test_bytes_that_are_no_text_are_refused() -> None:
    """Redis holds bytes, notices hold text."""
    entry = {name.encode(): text.encode() for name, text in to_fields(STEP).items()}
    with pytest.raises(BadFrame):
        from_fields(entry | {b"run": b"\xff"})


def test_what_is_no_notice_is_not_written() -> None:
    """A frame between workers, or a value of another type, is refused before it reaches the stream."""
    frame = ForwardFailed(node=0, stage=0, epoch=0, iteration=0, reason="")
    with pytest.raises(BadFrame, match="ForwardFailed"):
        to_fields(frame)  # type: ignore[arg-type]
    with pytest.raises(BadFrame, match="epoch"):
        to_fields(LinkLost(node=0, epoch="1", peer="w"))  # type: ignore[arg-type]
