"""Which weights a token came from, as the cluster tells it and a client reads it."""

from __future__ import annotations

import pytest

from lemix.answers import VersionSpans
from lemix.replies import end_in_hash, read_spans, tokens_of_versions
from lemix_common.ids import ItemId
from lemix_common.logprobs import TokenLogprob

TWO: VersionSpans = ((0, "0.1"), (3, "0.2"))


@pytest.mark.parametrize(
    ("fields", "spans"),
    [
        ({"weights_version": "0.1", "version_spans": ""}, ((0, "0.1"),)),
        ({"weights_version": "0.2", "version_spans": '[[0,"0.1"],[3,"0.2"]]'}, TWO),
        ({}, ()),
    ],
    ids=["never moved", "moved", "never begun"],
)
def test_spans_are_read_from_what_the_cluster_says(fields: dict[str, str], spans: VersionSpans) -> None:
    """Only an item that was moved has more than its version; the end names that of the first token."""
    assert read_spans(fields) == spans
    ended = end_in_hash(ItemId("a"), fields | {"state": "cancelled"})
    assert ended is not None
    assert ended.weights_version == (spans[0][1] if spans else "")


@pytest.mark.parametrize(
    ("index", "tokens", "expected"),
    [
        (0, [5, 6, 7, 8], [(0, (5, 6, 7), "0.1"), (3, (8,), "0.2")]),
        (0, [5, 6], [(0, (5, 6), "0.1")]),
        (2, [7, 8, 9], [(2, (7,), "0.1"), (3, (8, 9), "0.2")]),
        (3, [8], [(3, (8,), "0.2")]),
        (5, [9], [(5, (9,), "0.2")]),
        (4, [], []),
    ],
)
def test_tokens_are_cut_where_their_version_changes(
    index: int, tokens: list[int], expected: list[tuple[int, tuple[int, ...], str]]
) -> None:
    """Whatever part of a generation is asked for, each token has the version that computed it."""
    logprobs = [TokenLogprob(token, -1.0, ()) for token in tokens]
    parts = list(tokens_of_versions(ItemId("a"), index, tokens, TWO, logprobs))
    assert [(part.index, part.tokens, part.weights_version) for part in parts] == expected
    assert [tuple(entry.token for entry in part.logprobs) for part in parts] == [
        part.tokens for part in parts
    ]
