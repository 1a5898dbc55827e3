from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemix.items import GenerateItem
from lemix.preparation import prepare
from lemix_common.errors import ClusterError
from lemix_common.logprobs import TokenLogprob
from lemix_common.sampling import Sampling, Stopping
from lemix_common.stopped_text import stopped_text_of
from lemix_stage_worker.decoding import lazy_decoder
from lemix_stage_worker.finishing import Finish, Finishing, finishing_of
from unit.tiny_tokenization import bytes_tokenizer, tokenization

TOKENS = tokenization()
EOS = 256
PROMPT = "né"


def fields_of(
    max_new_tokens: int = 9, *, min_tokens: int = 0, ignore_eos: bool = False, **stops: Any
) -> dict[str, str]:
    """An item as the broker has it."""
    item = GenerateItem(
        PROMPT,
        max_new_tokens,
        sampling=Sampling(min_tokens=min_tokens),
        stopping=Stopping(**stops),
        ignore_eos=ignore_eos,
    )
    (prepared,) = prepare(item, TOKENS)
    return {name: str(value) for name, value in prepared.fields.items()}


def follow(fields: Mapping[str, str], tokens: Sequence[int], *, known: int = 0) -> tuple[int, Finishing]:
    """How many tokens there are at its end, the first ``known`` of them from an earlier attempt."""
    finishing = finishing_of(fields, eos_ids=[EOS], tokens=tokens[:known], decode=TOKENS.decode)
    for token in tokens[known:]:
        finishing.add(token)
    return finishing.num_tokens, finishing


def ids(text: str) -> tuple[int, ...]:
    return TOKENS.reference_ids(text)


def test_length_ends_a_request() -> None:
    """With the last token it may have, not before."""
    finishing = finishing_of(fields_of(2), eos_ids=[EOS], tokens=[], decode=TOKENS.decode)
    assert [finishing.add(1), finishing.add(2)] == [None, Finish("length")]
    assert finishing.result([1, 2]) == {"tokens": [1, 2], "finish_reason": "length"}


def test_the_models_end_ends_it_unless_it_is_ignored() -> None:
    """The model's own end has no stop reason."""
    assert follow(fields_of(), [1, EOS, 3])[1].finish == Finish("stop")
    ignoring = follow(fields_of(3, ignore_eos=True), [1, EOS, 3])[1]
    assert (ignoring.finish, ignoring.stop_ids) == (Finish("length"), ())


def test_a_stop_id_ends_it_and_is_named() -> None:
    """Also where the model's own end is ignored; min_tokens forbids all that end it."""
    count, finishing = follow(fields_of(stop_ids=(7, 8), ignore_eos=True), [1, 8, 3])
    assert (count, finishing.finish) == (2, Finish("stop", 8))
    assert finishing.result([1, 8])["stop_reason"] == 8
    assert follow(fields_of(stop_ids=(7,)), [])[1].stop_ids == (7, EOS)


def test_a_stop_string_over_several_tokens_ends_it() -> None:
    """With the token that completes it, though that is half a character's end."""
    count, finishing = follow(fields_of(stop_strings=("é!", "né")), ids("xné!"))
    assert (count, finishing.finish) == (4, Finish("stop", "né"))


def test_a_stop_string_may_be_complete_with_the_last_token() -> None:
    """Then it is a stop, not the length."""
    assert follow(fields_of(3, stop_strings=("bc",)), ids("abc"))[1].finish == Finish("stop", "bc")
    assert follow(fields_of(3, stop_strings=("bd",)), ids("abc"))[1].finish == Finish("length")


def test_half_a_character_at_the_end_is_text_too() -> None:
    """What is shown as a replacement character may be stopped at, once nothing can complete it."""
    half = ids("é")[0]
    assert follow(fields_of(2, stop_strings=("x\ufffd",)), [*ids("x"), half])[1].finish == Finish(
        "stop", "x\ufffd"
    )


def test_no_stop_string_counts_before_there_are_enough_tokens() -> None:
    """As with stop ids: the token that completes it is behind them."""
    fields = fields_of(stop_strings=("ab",), min_tokens=2)
    assert follow(fields, ids("abab"))[0] == 4
    assert follow(fields, ids("xab"))[0] == 3


@settings(max_examples=100)
@given(
    text=st.text("aé😀b", max_size=6),
    string=st.text("aé😀b", min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    data=st.data(),
)
def test_a_later_attempt_and_the_client_end_it_alike(
    text: str, string: str, min_tokens: int, include: bool, data: st.DataObject
) -> None:
    """Rebuilt from any number of tokens, and as the client shows its text: the same end and the same text."""
    tokens = ids(text) if text else ()
    fields = fields_of(8, stop_strings=(string,), min_tokens=min_tokens, include_stop=include)
    count, first = follow(fields, tokens)
    known = data.draw(st.integers(0, count))
    assert follow(fields, tokens, known=known)[1].finish == first.finish
    shown = stopped_text_of(fields, eos_ids=[EOS], decode=TOKENS.decode)
    told = "".join(shown.add([token]) for token in tokens[:count]) + shown.end()
    whole = TOKENS.decode(tokens[:count])
    if first.finish == Finish("stop", string):  # with its last token, which is a character's last byte
        assert shown.matched == string
        assert whole.endswith(string)
        assert told == (whole if include else whole.removesuffix(string))
    else:
        assert first.finish == (Finish("length") if count == 8 else None)
        assert (shown.matched, told) == (None, whole)


def test_an_ended_request_stays_as_it_ended() -> None:
    """Tokens behind its end change nothing; one that goes on has no result yet."""
    finishing = follow(fields_of(1), [5])[1]
    assert finishing.add(EOS) == Finish("length")
    with pytest.raises(ValueError, match="has not ended"):
        follow(fields_of(2), [5])[1].result([5])


def test_logprobs_are_in_the_result_if_there_are_any() -> None:
    """As nested lists that the client reads."""
    text = TokenLogprob(5, -0.5, ((5, -0.5),)).to_text()
    result = follow(fields_of(1), [5])[1].result([5], [text])
    assert json.loads(json.dumps(result))["logprobs"] == [[5, -0.5, [[5, -0.5]]]]


def test_the_tokenizer_is_read_for_the_first_stop_string() -> None:
    """Once, and never for requests without any."""
    reads: list[str] = []

    def read() -> str:
        reads.append("")
        return bytes_tokenizer()

    decode = lazy_decoder(read)
    finishing_of(fields_of(), eos_ids=[], tokens=ids("abc"), decode=decode)
    assert not reads
    for _ in range(2):
        finishing = finishing_of(fields_of(stop_strings=("c",)), eos_ids=[], tokens=ids("abc"), decode=decode)
        assert finishing.finish == Finish("stop", "c")
    assert len(reads) == 1
    with pytest.raises(ClusterError, match="publishes no tokenizer"):
        lazy_decoder(str)([1])
