from __future__ import annotations

from typing import Any

import pytest

from lemix.items import GenerateItem, ScoreItem, TrainItem
from lemix.preparation import prepare
from lemix_common.errors import BadInput, OverLong
from lemix_common.sampling import Sampling
from unit.tiny_tokenization import tokenization


def test_a_generation_carries_how_to_sample() -> None:
    """Everything the worker needs is a readable field."""
    item = GenerateItem([1, 2, 3], 4, sampling=Sampling(temperature=0.5, top_k=3, seed=9), ignore_eos=True)
    (prepared,) = prepare(item, tokenization())
    assert prepared.payload == {"prompt": (1, 2, 3)}
    expected = {"kind": "generate", "tokens": 7, "max_new_tokens": 4, "ignore_eos": 1, "temperature": 0.5}
    expected |= {"top_k": 3, "top_p": 1.0, "seed": 9, "reference_tokens": 0}
    assert {name: prepared.fields[name] for name in expected} == expected


def test_an_example_names_its_run() -> None:
    """The main run, unless told otherwise."""
    (prepared,) = prepare(TrainItem([1], [2, 3]), tokenization())
    assert (prepared.fields["run"], prepared.fields["tokens"], prepared.fields["reference_tokens"]) == (
        "main",
        3,
        2,
    )


def test_parts_have_ids_of_their_own() -> None:
    """Splitting the same example again gives the same ids."""
    item = TrainItem([1] * 4, [2] * 60, over_long="split", item_id="mine")
    assert [part.item_id for part in prepare(item, tokenization())] == ["mine.0", "mine.1", "mine.2"]
    (whole,) = prepare(TrainItem([1], [2], over_long="split", item_id="mine"), tokenization())
    assert whole.item_id == "mine"


def test_an_error_says_where_the_example_was_read() -> None:
    """File and line come first, and the error keeps its kind."""
    with pytest.raises(OverLong, match=r"^rows\.jsonl:7: 1 prompt \+ 99 reference tokens"):
        prepare(TrainItem([1], [2] * 99, where="rows.jsonl:7"), tokenization())


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (GenerateItem([1], 0), "at least 1"),
        (ScoreItem([1], [2], over_long="split"), "'split' is for training"),
        (ScoreItem([1], [2], over_long="shorten"), "use reject, truncate, split"),  # type: ignore[arg-type]
        (GenerateItem([1], 1, on_update="redo"), "use finish or rebuild"),  # type: ignore[arg-type]
        (ScoreItem([1], [2], item_id="a b"), "item id"),
        (ScoreItem([1], [2], item_id=""), "item id"),
    ],
)
def test_an_impossible_item_is_refused(item: Any, reason: str) -> None:
    """Each by its own reason."""
    with pytest.raises(BadInput, match=reason):
        prepare(item, tokenization())
