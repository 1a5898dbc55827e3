from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lemix.tokenization import Tokenization
from lemix_common.sampling import Stopping
from lemix_common.stopped_text import StoppedText, first_stop
from lemix_common.text_stream import TextStream, text_of
from unit.test_text_stream import BYTES, KINDS

LETTERS = "aé😀b"
STRINGS = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)


def stopped(
    tokens_of: Tokenization, strings: tuple[str, ...], *, include: bool = False, min_tokens: int = 0
) -> StoppedText:
    """A text that begins."""
    stopping = Stopping(stop_strings=strings, include_stop=include)
    return StoppedText(TextStream(tokens_of.decode, []), stopping, min_tokens)


def naive_end(text: str, strings: tuple[str, ...]) -> tuple[int, int] | None:
    """Where a stop string begins and ends, reading character by character."""
    for end in range(1, len(text) + 1):
        lengths = [len(string) for string in strings if text[:end].endswith(string)]
        if lengths:
            return end - max(lengths), end
    return None


@KINDS
@settings(max_examples=150)
@given(text=st.text(LETTERS, max_size=12), strings=STRINGS, include=st.booleans(), data=st.data())
def test_text_ends_at_the_first_stop_however_it_comes(
    tokens_of: Tokenization, text: str, strings: list[str], include: bool, data: st.DataObject
) -> None:
    """Though characters and stop strings are spread over tokens: as if the whole text were read by characters."""
    ids, several = tokens_of.reference_ids(text) if text else (), tuple(strings)
    shown = stopped(tokens_of, several, include=include)
    cut = data.draw(st.integers(0, len(ids)))
    pieces = [shown.add(ids[:cut]), shown.add(ids[cut:]), shown.end()]
    whole = text_of(tokens_of.decode, [], ids)
    found = naive_end(whole, several)
    assert "".join(pieces) == (whole if found is None else whole[: found[include]])
    assert shown.matched == (None if found is None else whole[slice(*found)])


@KINDS
@settings(max_examples=100)
@given(text=st.text(LETTERS, max_size=12), strings=STRINGS)
def test_nothing_is_shown_that_may_become_a_stop_and_nothing_else_is_held_back(
    tokens_of: Tokenization, text: str, strings: list[str]
) -> None:
    """After every token, what is shown is all of the text but the longest end that a stop string begins with."""
    ids, several = tokens_of.reference_ids(text) if text else (), tuple(strings)
    shown, plain, so_far, whole = stopped(tokens_of, several), TextStream(tokens_of.decode, []), "", ""
    for token in ids:
        so_far, whole = so_far + shown.add([token]), whole + plain.add([token])
        if shown.matched is not None:
            break
        kept = max(
            (size for string in several for size in range(len(string)) if whole.endswith(string[:size])),
            default=0,
        )
        assert so_far == whole[: len(whole) - kept]


def test_a_stop_string_counts_only_behind_enough_tokens() -> None:
    """One that is complete within the first tokens is text; the same letters may belong to a later one."""
    ids = BYTES.reference_ids("abaab!")
    early = stopped(BYTES, ("ab",), min_tokens=2)
    assert early.add(ids) + early.end() == "aba"
    overlapping = stopped(BYTES, ("aa",), min_tokens=2)
    ids = BYTES.reference_ids("aaa!")
    assert overlapping.add(ids) + overlapping.end() == "a"


def test_a_stop_string_that_did_not_count_is_not_held_back() -> None:
    """It can't become one any more; what may begin another still can."""
    shown = stopped(BYTES, ("aba", "xyz..."), min_tokens=4)
    assert [shown.add([token]) for token in BYTES.reference_ids("xaba")] == ["", "x", "", "ab"]
    assert shown.add(BYTES.reference_ids("c")) + shown.end() == "ac"


def test_what_is_held_back_is_shown_when_it_was_no_stop() -> None:
    """As soon as it is decided, or at the end."""
    shown = stopped(BYTES, ("</end>",))
    assert [shown.add(BYTES.reference_ids(piece)) for piece in ("x</en", "e", "</")] == ["x", "</ene", ""]
    assert shown.end() == "</"


def test_of_stops_at_the_same_character_the_longest_counts() -> None:
    """So that none of it is left in the text; of others, the first that is complete."""
    assert first_stop("xyab", ["b", "ab", "yab"], after=0) == (1, "yab")
    assert first_stop("abcd", ["abcd", "bc"], after=0) == (1, "bc")
    assert first_stop("abab", ["ab"], after=2) == (2, "ab")
    assert first_stop("abab", ["ba"], after=3) is None


def test_tokens_that_end_a_text_are_no_text() -> None:
    """Unless stops are to be included; what was held back before them is."""
    for include, text in ((False, "x<"), (True, "x<!")):
        shown = stopped(BYTES, ("<>",), include=include)
        (end,) = BYTES.reference_ids("!")
        shown.ending_ids = frozenset({end})
        assert shown.add([*BYTES.reference_ids("x<"), end]) + shown.end() == text
