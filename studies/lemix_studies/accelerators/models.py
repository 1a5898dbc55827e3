"""Models of the LeMix paper, by the shapes in their public configurations: parameters, operations, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder's shape."""

    family: Family
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    """Of GPT-2: how many have a learned embedding, and the longest sequence."""

    @property
    def kv_width(self) -> int:
        """Of a token's keys, and of its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's matrices: each is one multiplication and one addition a token."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        matrices = 3 if self.family == "llama" else 2
        return attention + matrices * self.hidden * self.feed_forward

    @property
    def layer_parameters(self) -> int:
        """With biases (GPT-2) and norms."""
        if self.family == "llama":
            return self.layer_weights + 2 * self.hidden
        return self.layer_weights + 9 * self.hidden + self.feed_forward

    @property
    def head_parameters(self) -> int:
        """Of the matrix to the vocabulary, which GPT-2 shares with its embedding where one stage has both."""
        return self.vocabulary * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the first stage beside its layers."""
        return (self.vocabulary + (self.positions if self.family == "gpt2" else 0)) * self.hidden

    @property
    def last_norm_parameters(self) -> int:
        """Before the head."""
        return self.hidden * (2 if self.family == "gpt2" else 1)

    @property
    def parameters(self) -> int:
        """Of the whole model, shared ones once."""
        own_head = self.head_parameters if self.family == "llama" else 0
        beside = self.embedding_parameters + self.last_norm_parameters + own_head
        return self.layers * self.layer_parameters + beside


def _gpt2(layers: int, hidden: int, heads: int) -> Model:
    return Model(
        family="gpt2",
        layers=layers,
        hidden=hidden,
        feed_forward=4 * hidden,
        heads=heads,
        kv_heads=heads,
        vocabulary=50_257,
        positions=1024,
    )


def _llama2(layers: int, hidden: int, feed_forward: int, heads: int, kv_heads: int) -> Model:
    return Model(
        family="llama",
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=32_000,
        positions=4096,
    )


MODELS: Final[Mapping[str, Model]] = {
    "dialogpt-small": _gpt2(12, 768, 12),
    "dialogpt-medium": _gpt2(24, 1024, 16),
    "dialogpt-large": _gpt2(36, 1280, 20),
    "llama-2-7b": _llama2(32, 4096, 11_008, 32, 32),
    "llama-2-13b": _llama2(40, 5120, 13_824, 40, 40),
    "llama-2-70b": _llama2(80, 8192, 28_672, 64, 8),
}
