"""What a model's stages cost on an accelerator, worked out from shapes and data sheets.

A forward takes a fixed time, the larger of launching its kernels and reading its weights, and beside it the time of its
operations: two a token and entry of every matrix, and of attention four a width, token and token attended to, halved
since nobody looks ahead. Both are added, though large passes hide one behind the other: passes of few rows don't
reach a large one's efficiency, and a line is what a `Profile` can hold. A decode iteration reads its rows' caches. A
backward is two forwards.

Weights are bfloat16. Where gradients, masters and moments in float32 fit beside them all weights are trained, else
adapters are (LoRA, Hu et al., 2021), for which only the inputs of layers are kept and the rest is computed again: their
backward is that forward, the gradients of activations, and no gradients of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_common.errors import BadInput, ModelError
from lemix_common.partition import cut_layers
from lemix_studies.accelerators.devices import DEVICES, Device
from lemix_studies.accelerators.models import MODELS, Model

Trained = Literal["all", "adapters"]

WEIGHT_BYTES: Final = 2
STATE_BYTES: Final = 16
"""Beside each trained weight: gradient, master and Adam's two moments, in float32."""
STEP_BYTES: Final = 30
"""Of each trained weight, what an optimizer step reads (all of these) and writes (these but the gradient; weights)."""
ADAPTER_RANK: Final = 16
LAUNCH_S: Final = 10e-6
KERNELS: Final = {"gpt2": 25, "llama": 40}
"""That a layer launches, without graphs."""
ACTIVATION_WIDTHS: Final = 34
"""Bytes a token, layer and hidden width that a backward needs (Korthikanti et al., 2022, with fused attention)."""
LOGIT_BYTES: Final = 6
"""Of a token and a word, until the loss is known: as computed, and in float32."""
HOP_S: Final = 20e-6
START_S: Final = 2.0
"""Of a worker whose process waits with its libraries loaded."""
DISK_BYTES_PER_SECOND: Final = 3e9
TYPICAL_TOKENS: Final = 256
"""Of a pass, for the cut into stages of about equal time."""
ROOM: Final = 0.95
"""Of the memory, what weights and states may take: the rest is for caches and activations."""


def profile_of(model: str, device: str, stages: int, *, trained: Trained | None = None) -> Profile:
    """The roofline of a model of `MODELS` in so many stages on accelerators of `DEVICES`.

    ``trained``: all weights or adapters; by default all if they fit. `BadInput` for names that aren't known, and where
    a stage's weights, or what training them takes, are too large for an accelerator.
    """
    shape, accelerator = MODELS.get(model), DEVICES.get(device)
    if shape is None:
        raise BadInput(f"there is no profile of model {model!r}: use {', '.join(MODELS)}")
    if accelerator is None:
        raise BadInput(f"there is no profile of device {device!r}: use {', '.join(DEVICES)}")
    try:
        parts = _parts(shape, accelerator, stages)
    except ModelError as error:
        raise BadInput(f"{model}: {error}") from None
    for choice in (trained,) if trained else ("all", "adapters"):
        costs = tuple(_stage_costs(part, shape, accelerator, choice) for part in parts)
        if (
            max(stage.weight_bytes + stage.training_bytes for stage in costs)
            <= ROOM * accelerator.memory_bytes
        ):
            break
    else:
        heaviest = max(costs, key=lambda stage: stage.weight_bytes + stage.training_bytes)
        raise BadInput(
            f"{model} in {stages} stage{'s' * (stages > 1)} doesn't fit {device}: a stage has "
            f"{heaviest.weight_bytes / 1e9:.1f} GB of weights and {heaviest.training_bytes / 1e9:.1f} GB for training, "
            f"of {accelerator.memory_bytes / 1e9:.1f} GB; take more stages"
        )
    width_bytes = WEIGHT_BYTES * shape.hidden
    return Profile(
        model=model,
        device=device,
        source="roofline",
        stages=costs,
        hop=Cost(base=HOP_S, token=width_bytes / accelerator.hop_bytes_per_second),
        memory_bytes=accelerator.memory_bytes,
        load_s=START_S + max(stage.weight_bytes for stage in costs) / DISK_BYTES_PER_SECOND,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a stage consists of."""

    layers: int
    has_embedding: bool
    has_head: bool


def _parts(model: Model, device: Device, stages: int) -> list[_Part]:
    """Contiguous layers, so that the slowest stage is as fast as can be for a typical pass."""
    layer = LAUNCH_S * KERNELS[model.family] + TYPICAL_TOKENS * 2 * model.layer_weights / device.flops
    head = TYPICAL_TOKENS * 2 * model.head_parameters / device.flops
    cut = cut_layers([layer] * model.layers, stages, last_extra=head)
    return [
        _Part(layers=len(layers), has_embedding=stage == 0, has_head=stage == stages - 1)
        for stage, layers in enumerate(cut)
    ]


def _stage_costs(part: _Part, model: Model, device: Device, trained: Trained) -> StageCosts:
    parameters = _parameters(part, model)
    weights = part.layers * model.layer_weights + part.has_head * model.head_parameters
    read_s = WEIGHT_BYTES * weights / device.read_bytes_per_second
    fixed_s = max(LAUNCH_S * KERNELS[model.family] * part.layers, read_s)
    token_s = 2 * weights / device.flops
    attention_s = part.layers * 2 * model.hidden / device.flops
    kv_token_bytes = part.layers * 2 * model.kv_width * WEIGHT_BYTES
    trainable = parameters if trained == "all" else _adapter_parameters(part, model)
    again = 0 if trained == "all" else 1
    kept_widths = ACTIVATION_WIDTHS * part.layers
    if again:
        kept_widths = WEIGHT_BYTES * part.layers + ACTIVATION_WIDTHS
    return StageCosts(
        forward=Cost(base=fixed_s, token=token_s, context=attention_s),
        backward=Cost(base=(2 + again) * fixed_s, token=2 * token_s, context=(2 + again) * attention_s),
        decode=Cost(base=fixed_s, token=token_s, context=kv_token_bytes / device.read_bytes_per_second),
        optimizer_s=LAUNCH_S * KERNELS[model.family] + STEP_BYTES * trainable / device.read_bytes_per_second,
        activation_bytes=Cost(
            token=kept_widths * model.hidden + part.has_head * LOGIT_BYTES * model.vocabulary
        ),
        kv_token_bytes=kv_token_bytes,
        weight_bytes=WEIGHT_BYTES * parameters,
        training_bytes=STATE_BYTES * trainable,
    )


def _parameters(part: _Part, model: Model) -> int:
    own_head = part.has_head and not (part.has_embedding and model.family == "gpt2")
    return (
        part.layers * model.layer_parameters
        + part.has_embedding * model.embedding_parameters
        + part.has_head * model.last_norm_parameters
        + own_head * model.head_parameters
    )


def _adapter_parameters(part: _Part, model: Model) -> int:
    """Two thin matrices beside each of a layer's: a rank's worth of its inputs and its outputs."""
    attention = 2 * 2 * model.hidden + 2 * (model.hidden + model.kv_width)
    matrices = 3 if model.family == "llama" else 2
    return part.layers * ADAPTER_RANK * (attention + matrices * (model.hidden + model.feed_forward))
