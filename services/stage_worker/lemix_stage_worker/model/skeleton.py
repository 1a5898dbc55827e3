"""The whole model without its values: transformers' own modules, every parameter on the meta device."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lemix_common.errors import ModelError
from lemix_stage_worker.model.attention import attend_by_segments
from lemix_stage_worker.model.families import Family, family_of
from lemix_stage_worker.model.weights import TensorSpec

_from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config

HEAD = "lm_head"
HEAD_WEIGHT = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The parts of a causal language model, and the names its checkpoint gives them."""

    whole: PreTrainedModel
    base: PreTrainedModel
    head: nn.Linear
    family: Family
    prefix: str
    """The base's name inside the whole: the first word of its parameters' names."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every parameter by its checkpoint name, in model order; a tied head is left out."""
        return {
            name: TensorSpec(parameter.dtype, tuple(parameter.shape))
            for name, parameter in self.whole.named_parameters()
        }

    @property
    def embedding_name(self) -> str:
        return f"{self.prefix}.{self.family.embedding}.weight"


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None) -> Skeleton:
    """The model of a config, without dropout, in evaluation mode; `ModelError` where it has no known family.

    `attention` names one of transformers' attention implementations; None takes torch's own (SDPA) where the model
    allows it, on packed rows by segments.
    """
    with torch.device("meta"):
        whole = build_whole(without_dropout(config), dtype, attention)
    if attention is None:
        attend_by_segments(whole)
    prefix = str(whole.base_model_prefix)
    base, head = getattr(whole, prefix, None), getattr(whole, HEAD, None)
    if not (isinstance(base, PreTrainedModel) and isinstance(head, nn.Linear)):
        raise ModelError(
            f"models of type {config.model_type!r} can't be cut into stages: no linear {HEAD!r} on a base"
        )
    family = family_of(base, config.model_type)
    return Skeleton(whole=whole, base=base, head=head, family=family, prefix=prefix)


def build_whole(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """transformers' own causal language model of a config, in evaluation mode; the config is changed by it.

    transformers would set torch's default type meanwhile, which is the process's: threads that compute, or build
    another model, would see it. So the model is built in float32, and its parameters get their type afterwards.
    """
    choice = {} if attention is None else {"attn_implementation": attention}
    try:
        whole = _from_config(config, dtype=torch.float32, **choice)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers can't build a {config.model_type!r} language model: {reason(error)}"
        ) from error
    whole.train(mode=False)
    if dtype != torch.float32:
        for parameter in whole.parameters():
            parameter.data = parameter.data.to(dtype)
        whole.config.dtype = dtype
    return whole


def reason(error: Exception) -> str:
    """What transformers says, in one line; the whole is often a page."""
    return textwrap.shorten(str(error), 240)


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config with every dropout probability at zero: replays must be exact."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
