from __future__ import annotations

from typing import Any

import pytest

from lemix.items import GenerateItem, ScoreItem, TrainItem, answers
from lemix.preparation import prepare
from lemix.tokenization import ModelCard, Tokenization
from lemix_common.errors import BadInput, OverLong
from lemix_common.sampling import Sampling, Stopping
from unit.tiny_tokenization import tokenization


def test_a_generation_carries_how_to_sample() -> None:
    """Everything the worker needs is a readable field."""
    item = GenerateItem([1, 2, 3], 4, sampling=Sampling(temperature=0.5, top_k=3, seed=9), ignore_eos=True)
    (prepared,) = prepare(item, tokenization())
    assert prepared.payload == {"prompt": (1, 2, 3)}
    expected = {"kind": "generate", "tokens": 7, "max_new_tokens": 4, "ignore_eos": 1, "temperature": 0.5}
    expected |= {"top_k": 3, "top_p": 1.0, "seed": 9, "reference_tokens": 0}
    assert {name: prepared.fields[name] for name in expected} == expected


def test_what_goes_without_saying_is_no_field() -> None:
    """A priority, and whether an item ends with its client, are said where they aren't the default."""
    (plain,) = prepare(ScoreItem([1], [2]), tokenization())
    assert not {"priority", "while_connected", "deadline_s", "deadline_at"} & plain.fields.keys()
    (urgent,) = prepare(GenerateItem([1], 2, priority=-3, while_connected=True), tokenization())
    assert (urgent.fields["priority"], urgent.fields["while_connected"]) == (-3, 1)


def test_every_part_of_an_example_has_its_deadline() -> None:
    """They are queued one after the other, each for as long."""
    parts = prepare(TrainItem([1] * 4, [2] * 60, over_long="split", deadline_s=5.0), tokenization())
    assert [part.deadline_s for part in parts] == [5.0] * 3


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
        (GenerateItem([1], -3), "max_new_tokens -3: ask for at least 1"),
        (GenerateItem([1], 2.5), "max_new_tokens 2.5: ask for at least 1"),  # type: ignore[arg-type]
        (GenerateItem([1] * 30, 3), "30 prompt \\+ 3 new tokens = 33, but the model's context is 32"),
        (GenerateItem([1], 33, over_long="truncate"), "leave no room for a prompt"),
        (GenerateItem([], 1), "the prompt is empty"),
        (GenerateItem("", 1), "the prompt is empty"),
        (GenerateItem([1, 263], 1), "token 263 at position 1 is not in the model's vocabulary"),
        (GenerateItem([-1], 1), "token -1 at position 0 is not in the model's vocabulary"),
        (GenerateItem([1.0], 1), "token 1.0 at position 0"),  # type: ignore[list-item]
        (GenerateItem([1], 4, sampling=Sampling(min_tokens=5)), "min_tokens 5 is more than max_new_tokens 4"),
        (GenerateItem([1], 4, stopping=Stopping(stop_ids=(263,))), "stop id 263 is not in the model's voc"),
        (ScoreItem([1], [2], over_long="split"), "'split' is for training"),
        (ScoreItem([1], [2], over_long="shorten"), "use reject, truncate, split"),  # type: ignore[arg-type]
        (GenerateItem([1], 1, on_update="redo"), "use finish or rebuild"),  # type: ignore[arg-type]
        (ScoreItem([1], [2], item_id="a b"), "item id"),
        (ScoreItem([1], [2], priority=11), "priority 11: use a whole number from -10 to 10"),
        (GenerateItem([1], 1, priority=-11), "priority -11"),
        (GenerateItem([1], 1, priority=0.5), "priority 0.5"),  # type: ignore[arg-type]
        (GenerateItem([1], 1, priority=True), "priority True"),
        (GenerateItem([1], 1, deadline_s=0.0), "deadline_s 0.0: use a number of seconds above 0"),
        (ScoreItem([1], [2], deadline_s=float("nan")), "deadline_s nan"),
        (TrainItem([1], [2], deadline_s=-1.0), "deadline_s -1.0"),
        (ScoreItem([1], [2], item_id=""), "item id"),
    ],
)
def test_an_impossible_item_is_refused(item: Any, reason: str) -> None:
    """Each by its own reason."""
    with pytest.raises(BadInput, match=reason):
        prepare(item, tokenization())


def test_a_generation_carries_what_ends_it() -> None:
    """Stops are readable fields too."""
    stopping = Stopping(stop_ids=(7,), stop_strings=("\n", "é"), include_stop=True)
    (prepared,) = prepare(GenerateItem([1], 4, stopping=stopping), tokenization())
    assert prepared.fields["stop_ids"] == "[7]"
    assert prepared.fields["stop_strings"] == '["\\n", "\\u00e9"]'
    assert prepared.fields["include_stop"] == 1


def test_stop_strings_need_a_tokenizer() -> None:
    """A model without one has no text to look for them in; stop ids do."""
    card = ModelCard(context_length=32, vocab_size=263, tokenizer_sha256="")
    item = GenerateItem([1], 4, stopping=Stopping(stop_strings=("x",)))
    with pytest.raises(BadInput, match="stop strings need a tokenizer"):
        prepare(item, Tokenization(card, None))
    assert prepare(GenerateItem([1], 4, stopping=Stopping(stop_ids=(1,))), Tokenization(card, None))


def test_several_answers_are_items_of_their_own() -> None:
    """Names and seeds count up, seeds around their end; else they are alike."""
    item = GenerateItem([1], 4, sampling=Sampling(temperature=1.0, seed=2**64 - 2), item_id="mine")
    several = answers(item, 3)
    assert [one.item_id for one in several] == ["mine.0", "mine.1", "mine.2"]
    assert [one.sampling.seed for one in several] == [2**64 - 2, 2**64 - 1, 0]
    assert len({one.item_id for one in answers(GenerateItem([1]), 5)}) == 5


@pytest.mark.parametrize("count", [0, -1, 129, 1.5])
def test_a_number_of_answers_must_be_possible(count: Any) -> None:
    """At least one, at most as many as the limit says."""
    with pytest.raises(BadInput, match=r"n .* can't be used: ask for 1 to 128 answers"):
        answers(GenerateItem([1]), count)
