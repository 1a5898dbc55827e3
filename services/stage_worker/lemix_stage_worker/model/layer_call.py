"""What a base module gives to each of its layers: computed once for all layers of a stage, as transformers does.

A part of a stage is one layer under a base module of its own, whose forward would make the mask and the positions'
embeddings again. So the first part's forward is listened to, and the layers after it are called with the same. Layers
of several kinds (full and sliding attention, say) are given different masks, so each kind's first part is listened to.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lemix_stage_worker.model.stage import StageModel


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """The arguments of a layer, beside the hidden states."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self, part: StageModel, hidden_BTD: Tensor) -> Tensor:
        """What a part computes that is a layer of the same kind and has no embedding."""
        output = _layer(part)(hidden_BTD, *self.arguments, **self.options)
        norm: nn.Module = getattr(part.base, part.family.norm)
        normed_BTD: Tensor = norm(output[0] if isinstance(output, tuple) else output)
        return normed_BTD


def listen(part: StageModel, ids_or_hidden: Tensor, positions: Tensor) -> tuple[Tensor, LayerCall]:
    """Run a part of one layer, and tell how its layer was called."""
    heard: list[LayerCall] = []

    def hear(_layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        heard.append(LayerCall(arguments[1:], options))

    hook = _layer(part).register_forward_pre_hook(hear, with_kwargs=True)
    try:
        return part(ids_or_hidden, positions), heard[0]
    finally:
        hook.remove()


def kind_of(part: StageModel) -> str | None:
    """What its layer is called alike with others for; None where all of a model's layers are of one kind."""
    kinds: list[str] | None = getattr(part.base.config, "layer_types", None)
    return kinds[0] if kinds else None


def _layer(part: StageModel) -> nn.Module:
    layers: nn.ModuleList = getattr(part.base, part.family.layers)
    return layers[0]
