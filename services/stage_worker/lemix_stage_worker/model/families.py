"""Which decoders can be cut: by the structure of their base module, not by their names.

A family is data: what the parts are called. A model whose base owns anything else, or computes something
between the parts, is refused: here by its parts, and by `self_check` by its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lemix_common.errors import ModelError

MATRIX = 2
"""The dimensions of a weight; more of them are the stacked experts of a mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of a base module's parts."""

    name: str
    embedding: str
    layers: str
    norm: str
    positions: str | None = None
    """A learned position embedding, added to the embedding."""

    @property
    def parts(self) -> frozenset[str]:
        """The only children that may own parameters."""
        return frozenset(filter(None, (self.embedding, self.layers, self.norm, self.positions)))


FAMILIES = (
    Family(name="llama", embedding="embed_tokens", layers="layers", norm="norm"),
    Family(name="gpt2", embedding="wte", layers="h", norm="ln_f", positions="wpe"),
    Family(name="phi", embedding="embed_tokens", layers="layers", norm="final_layernorm"),
)


def family_of(base: nn.Module, model_type: str) -> Family:
    """The family whose parts the base module has, and nothing else with parameters; else a `ModelError`."""
    children = dict(base.named_children())
    owners = {name for name, child in children.items() if any(True for _ in child.parameters())}
    if any(parameter.dim() > MATRIX for parameter in base.parameters()):
        raise ModelError(f"models of type {model_type!r} can't be cut into stages: they have experts")
    for family in FAMILIES:
        if owners <= family.parts <= children.keys():
            return family
    raise ModelError(
        f"models of type {model_type!r} can't be cut into stages: their parts are {', '.join(sorted(owners))}; "
        f"use a decoder built like {', '.join(family.name for family in FAMILIES)}"
    )
