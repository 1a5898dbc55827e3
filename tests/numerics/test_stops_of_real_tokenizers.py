"""Where texts end with the tokenizers of trained models: merged bytes, words with their spaces, bytes without words."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lemix.tokenization import Tokenization
from lemix_common.sampling import Stopping
from lemix_common.stopped_text import StoppedText
from lemix_common.text_stream import TextStream, last_piece, text_of
from numerics.subjects import REAL_MODELS, TRAINED
from references import tokenization_of

TEXTS = st.lists(
    st.sampled_from(
        ["Once upon", " a time", ", ", "there ", "was", "\n\n", "é", "日本", "😀", "  ", "!", "the end"]
    ),
    min_size=1,
    max_size=10,
).map("".join)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request: pytest.FixtureRequest) -> Tokenization:
    """A trained model's tokens."""
    folder = REAL_MODELS / str(request.param)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return tokenization_of(folder)


@pytest.mark.data
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, data=st.data())
def test_a_text_ends_before_its_first_stop(trained: Tokenization, text: str, data: st.DataObject) -> None:
    """Any piece of it, however its letters are spread over tokens; what is shown only grows, to exactly that."""
    prompt = trained.prompt_ids("Lily said")
    ids, before = trained.reference_ids(text), last_piece(trained.decode, prompt)
    whole = text_of(trained.decode, before, ids)
    begin = data.draw(st.integers(0, len(whole) - 1))
    string = whole[begin : begin + data.draw(st.integers(1, 6))]
    shown = StoppedText(TextStream(trained.decode, list(before)), Stopping(stop_strings=(string,)))
    so_far = ""
    for number, token in enumerate(ids, start=1):
        so_far += shown.add([token])
        assert whole.startswith(so_far)
        if shown.matched is not None:
            assert string in text_of(trained.decode, before, ids[:number])
            break
    assert so_far + shown.end() == whole[: whole.index(string)]
