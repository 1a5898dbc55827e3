from __future__ import annotations

from dataclasses import replace

import pytest

from lemix.tokenization import ModelCard, open_tokenization
from lemix_common.errors import BadInput, TokenizerMismatch
from unit.tiny_tokenization import BOS, bytes_tokenizer, tokenization


def test_a_prompt_gets_the_tokenizers_special_tokens() -> None:
    """A text begins as the tokenizer says; a reference goes on from it and gets none."""
    assert tokenization().prompt_ids("a")[0] == BOS
    assert tokenization().prompt_ids("a")[1:] == tokenization().reference_ids("a")


def test_ids_are_taken_as_they_are() -> None:
    """A list of ids gets no special token."""
    assert tokenization().prompt_ids([7, 8]) == (7, 8)


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(prompt: str | list[int]) -> None:
    """Even where the tokenizer would make a special token of it."""
    with pytest.raises(BadInput, match="the prompt is empty"):
        tokenization().prompt_ids(prompt)


@pytest.mark.parametrize("reference", ["", []])
def test_a_zero_token_reference_is_refused(reference: str | list[int]) -> None:
    """There would be nothing to score or learn."""
    with pytest.raises(BadInput, match="the reference has no tokens"):
        tokenization().reference_ids(reference)


@pytest.mark.parametrize("token", [-1, 263, 2**70, True, 1.0, "a"])
def test_an_unknown_token_id_is_refused(token: object) -> None:
    """The error names the token, its place and the ids there are."""
    with pytest.raises(BadInput, match=r"position 1 is not in the model's vocabulary \(ids 0 to 262\)"):
        tokenization().prompt_ids([1, token])  # type: ignore[list-item]


def test_invalid_utf8_is_refused() -> None:
    """Undecodable bytes of a command line arrive as lone surrogates."""
    with pytest.raises(BadInput, match="the prompt is not valid UTF-8 at character 1"):
        tokenization().prompt_ids("a\udcff")


def test_another_tokenizer_than_the_models_is_refused() -> None:
    """What the cluster publishes must fit together."""
    card = replace(tokenization().card, tokenizer_sha256="0" * 64)
    with pytest.raises(TokenizerMismatch):
        open_tokenization(card, bytes_tokenizer())


def test_a_damaged_tokenizer_is_one_clear_error() -> None:
    """A tokenizer.json that can't be read is no traceback."""
    with pytest.raises(BadInput, match="tokenizer can't be read"):
        tokenization("{}")


def test_a_model_without_tokenizer_takes_ids_only() -> None:
    """Ids work, texts say why not, and there is no text to show."""
    without = tokenization("")
    assert without.prompt_ids([1]) == (1,)
    assert without.decode([1]) == ""
    with pytest.raises(BadInput, match="give token ids"):
        without.prompt_ids("a")


def test_a_card_is_read_from_the_clusters_hash() -> None:
    """A model without a first token has none."""
    fields = {"context_length": "8", "vocab_size": "9", "tokenizer_sha256": "x", "eos_token_ids": "[2, 3]"}
    card = ModelCard.parse(fields | {"bos_token_id": ""})
    assert (card.context_length, card.bos_token_id, card.eos_token_ids) == (8, None, (2, 3))
    assert ModelCard.parse(fields | {"bos_token_id": "1"}).bos_token_id == 1
