from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lemix.tokenization import Tokenization
from lemix_common.text_stream import TextStream, last_piece, text_of
from unit.tiny_tokenization import tokenization, words_tokenizer

BYTES = tokenization()
WORDS = tokenization(words_tokenizer())
KINDS = pytest.mark.parametrize("tokens_of", [BYTES, WORDS], ids=["bytes", "words"])
TOKENS = st.lists(st.integers(0, 262), max_size=30)


@KINDS
@settings(max_examples=40)
@given(text=st.text(max_size=20), prompt=st.text(min_size=1, max_size=8))
def test_pieces_are_whole_characters_that_add_up(tokens_of: Tokenization, text: str, prompt: str) -> None:
    """Every piece ends with a whole character, and together they are the text as it goes on from the prompt."""
    before, ids = tokens_of.prompt_ids(prompt), tokens_of.prompt_ids(prompt + text)
    assume(ids[: len(before)] == before and "\ufffd" not in prompt + text)
    stream = TextStream(tokens_of.decode, list(last_piece(tokens_of.decode, before)))
    pieces = [stream.add([token]) for token in ids[len(before) :]]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.end() == text


@KINDS
@settings(max_examples=40)
@given(tokens=TOKENS, prompt=TOKENS, data=st.data())
def test_text_does_not_depend_on_how_tokens_arrive(
    tokens_of: Tokenization, tokens: list[int], prompt: list[int], data: st.DataObject
) -> None:
    """Any tokens, cut in any way, give the same text as the whole, even where they are no valid text."""
    cut, before = data.draw(st.integers(0, len(tokens))), last_piece(tokens_of.decode, prompt)
    stream = TextStream(tokens_of.decode, list(before))
    pieces = stream.add(tokens[:cut]) + stream.add(tokens[cut:]) + stream.end()
    assert pieces == text_of(tokens_of.decode, before, tokens)


def test_a_prompt_goes_on_from_whole_characters() -> None:
    """Of bytes that are one character, all; of a half one, nothing."""
    ids = WORDS.reference_ids("本語")
    assert last_piece(WORDS.decode, ids) == ids[-3:]
    assert last_piece(WORDS.decode, ids[:-1]) == ()


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    """The decoder drops the first space of a text, but a generation isn't the beginning of one."""
    there, was = 258, 259
    assert text_of(WORDS.decode, [there], [was]) == " was"
    assert text_of(WORDS.decode, [], [there]) == "there"


def test_a_prompt_of_one_space_is_a_beginning() -> None:
    """The decoder drops a text's first space; if that is the whole prompt, a second one is generated text."""
    space = list(WORDS.reference_ids(" "))
    assert WORDS.decode(space) == ""
    assert text_of(WORDS.decode, last_piece(WORDS.decode, space), space) == " "


def test_half_a_character_is_shown_at_the_end_only() -> None:
    """What will never be completed is shown as what it is."""
    half = list(BYTES.reference_ids("é"))[:1]
    stream = TextStream(BYTES.decode, [])
    assert stream.add(half) == ""
    assert stream.end() == "\ufffd"
