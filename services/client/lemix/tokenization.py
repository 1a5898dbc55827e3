"""From text to token ids and back, with the tokenizer that the cluster publishes.

Bad input fails here, before anything is queued. The tokenizer's hash travels with each item, so that a text tokenized
for another model is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from lemix.items import Text
from lemix_common.errors import BadInput, TokenizerMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a client needs to know of the cluster's model."""

    context_length: int
    vocab_size: int
    tokenizer_sha256: str
    family: str = ""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def parse(cls, fields: Mapping[str, str]) -> ModelCard:
        """Read the cluster's ``model`` hash."""
        bos = fields.get("bos_token_id", "")
        return cls(
            context_length=int(fields["context_length"]),
            vocab_size=int(fields["vocab_size"]),
            tokenizer_sha256=fields["tokenizer_sha256"],
            family=fields.get("family", ""),
            bos_token_id=int(bos) if bos.isdecimal() else None,
            eos_token_ids=tuple(json.loads(fields.get("eos_token_ids") or "[]")),
        )


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A model's tokens: encode at the border, once; decode for people."""

    card: ModelCard
    tokenizer: Tokenizer | None

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """A prompt's tokens, with the special tokens that the tokenizer puts around a text."""
        ids = self._encode(prompt, "prompt", add_special_tokens=True)
        if not ids or prompt == "":
            raise BadInput("the prompt is empty: give at least one token to go on from")
        return ids

    def reference_ids(self, reference: Text) -> tuple[int, ...]:
        """A reference's tokens; it continues the prompt, so no special tokens are added."""
        ids = self._encode(reference, "reference", add_special_tokens=False)
        if not ids:
            raise BadInput("the reference has no tokens: there would be nothing to score or learn")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out; empty if the model has no tokenizer."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True) if self.tokenizer else ""

    def _encode(self, text: Text, name: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(text, str):
            return self._check_ids(text, name)
        check_utf8(text, f"the {name}")
        if self.tokenizer is None:
            raise BadInput(f"the {name} is a text, but the cluster's model has no tokenizer: give token ids")
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._check_ids(ids, name)

    def _check_ids(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        size = self.card.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise BadInput(
                    f"the {name}'s token {token!r} at position {position} is not in the model's vocabulary "
                    f"(ids 0 to {size - 1})"
                )
        return tuple(ids)


def check_utf8(text: str, name: str) -> None:
    """Refuse a text that can't be written as UTF-8 (half a surrogate pair, from undecodable input)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name} is not valid UTF-8 at character {error.start}") from None


def open_tokenization(card: ModelCard, tokenizer_json: str) -> Tokenization:
    """The cluster's tokenizer; `TokenizerMismatch` if it isn't the one its model names."""
    if not tokenizer_json:
        return Tokenization(card, None)
    found = tokenizer_sha256(tokenizer_json)
    if found != card.tokenizer_sha256:
        raise TokenizerMismatch(
            f"the cluster's tokenizer has sha256 {found[:12]}…, but its model names {card.tokenizer_sha256[:12]}…: "
            "restart the cluster with `lemix up`"
        )
    try:
        return Tokenization(card, Tokenizer.from_str(tokenizer_json))
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise BadInput(f"the cluster's tokenizer can't be read: {error}") from error


def tokenizer_sha256(tokenizer_json: str) -> str:
    """What names a tokenizer."""
    return hashlib.sha256(tokenizer_json.encode()).hexdigest()
