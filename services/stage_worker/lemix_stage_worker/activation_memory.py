"""How many bytes training takes on a stage, told before it is done.

What a layer keeps for its backward is counted where it arises: autograd hands every tensor that it saves to a hook. It
grows with the tokens of a microbatch, and attention's kernels keep nothing that grows faster, but for a mask where an
example is longer than the model's window. So two short probes of each layer tell the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lemix_common.schedules import held_by_stage, schedule_named
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.layer_passes import HEAD_ROWS
from lemix_stage_worker.model.stage import StageModel

_PROBES = (16, 48)
"""Tokens; a multiple of the kernels' alignments apart."""
_HEAD_COPIES = 3
"""Log-probabilities of a chunk, and two gradients of the same size while the head goes back."""


@dataclass(eq=False)
class SavedTensors:
    """What autograd saves while it is asked to be counted, each storage once."""

    _by_storage: dict[int, Tensor] = field(default_factory=dict)
    """They are kept, so that no other takes their place in memory."""

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that nothing but the caller keeps."""
        self._by_storage[_storage(tensor)] = tensor
        return tensor

    def counting(self) -> saved_tensors_hooks:
        """What is computed meanwhile is counted."""
        return saved_tensors_hooks(self.add, _unchanged)

    def bytes_beside(self, others: Iterable[Tensor]) -> int:
        """Their size, without what is stored where one of the others is (parameters, buffers)."""
        apart = {_storage(tensor) for tensor in others}
        return sum(
            tensor.untyped_storage().nbytes()
            for storage, tensor in self._by_storage.items()
            if storage not in apart
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """What one layer keeps of a microbatch until its gradients are there, its input included, its output not."""

    fixed: int
    per_token: float
    input_per_token: int
    mask_element: int
    """Bytes of a mask's element."""
    window: int | None
    """Examples of this many tokens and more take a mask of their own."""

    def kept(self, lengths: Sequence[int]) -> int:
        """Bytes kept of a microbatch of such examples."""
        masked = sum(length**2 for length in lengths if self.window is not None and length >= self.window)
        return round(self.fixed + self.per_token * sum(lengths)) + self.mask_element * masked


@dataclass(frozen=True, slots=True, kw_only=True)
class StageActivations:
    """What a stage keeps of microbatches, and takes while it works on one."""

    layers: tuple[LayerActivations, ...]
    output_per_token: int
    largest_gradient: int
    """Of a layer's parameters: it is computed before it is added to what there is."""
    head_row: int
    """Bytes of one position's logits, at their precision in the loss; 0 without a head."""
    head_gradient: int
    """Of the head's parameters, kept apart (or less, of which it is made) until a microbatch's last one; else 0."""

    def held(self, lengths: Sequence[int], *, recompute: bool = False) -> int:
        """Bytes held of a microbatch between its forward and its last gradient, by its examples' tokens."""
        num_tokens = sum(lengths)
        layers = (
            layer.input_per_token * num_tokens if recompute else layer.kept(lengths) for layer in self.layers
        )
        return sum(layers) + self.output_per_token * num_tokens

    def at_work(self, lengths: Sequence[int], *, recompute: bool = False) -> int:
        """Bytes that come on top while one microbatch is computed on; at most, for a layer or for the head.

        A layer's backward makes gradients of what it kept, one after the other; with recomputation that has to be made
        again first.
        """
        num_tokens = sum(lengths)
        layer = (
            max(layer.kept(lengths) for layer in self.layers) * (2 if recompute else 1)
            + self.largest_gradient
        )
        head = self.head_row * _HEAD_COPIES * min(HEAD_ROWS, num_tokens) + self.output_per_token * num_tokens
        if num_tokens > HEAD_ROWS:
            head += self.head_gradient  # a chunk's, before it is added to the others'
        return max(layer, head) if self.head_row else layer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingWay:
    """How a stage trains, as far as its memory depends on it."""

    held: int
    """Microbatches held at a time: what `lemix_common.schedules.memory.held_by_stage` says of the stage."""
    moments: int = 2
    """The optimizer's tensors for each parameter: AdamW 2, SGD 0."""
    weight_copies: int = 1
    recompute: bool = False
    splits: bool = False
    """Backwards are in two halves."""


def training_way(settings: ClusterSettings, stage: int) -> TrainingWay:
    """How a stage trains by these settings."""
    microbatches = settings.microbatches or settings.step_examples
    schedule = schedule_named(
        "1f1b" if settings.overlaps_steps else settings.schedule,
        stages=settings.stages,
        microbatches=max(microbatches, settings.stages) if settings.overlaps_steps else microbatches,
        workers=settings.num_workers // settings.nodes if settings.schedule == "interleaved" else None,
    )
    return TrainingWay(
        held=held_by_stage(schedule)[stage],
        moments=2 if settings.optimizer == "adamw" else 0,
        weight_copies=2 if settings.overlaps_steps else 1,
        recompute=settings.recompute,
        splits=settings.schedule == "zero-bubble",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """The bytes that training takes on a stage, by what for."""

    weights: int
    masters: int
    """float32 copies of weights that are computed with in less."""
    moments: int
    gradients: int
    """What microbatches add up."""
    shard_sums: int
    activations: int
    """Of the microbatches held at a time, and the head's gradients that wait for the end of theirs."""
    workspace: int
    """Of the one that is computed on."""

    @property
    def total(self) -> int:
        return sum(
            (
                *(self.weights, self.masters, self.moments, self.gradients),
                *(self.shard_sums, self.activations, self.workspace),
            )
        )


def measure_activations(stage: StageModel) -> StageActivations:
    """Probe every layer of a loaded stage with two short rows of random hidden states."""
    parts = stage.parts()
    leaves = stage.leaves().values()
    hidden_size = int(stage.base.config.hidden_size)
    dtype = next(iter(leaves)).dtype
    head = None if stage.head is None else stage.head.weight
    head_dtype = torch.promote_types(dtype, torch.float32)
    return StageActivations(
        layers=tuple(_probe(part, hidden_size, dtype) for part in parts),
        output_per_token=hidden_size * dtype.itemsize,
        largest_gradient=max(leaf.nbytes for leaf in leaves if leaf is not head),
        head_row=0 if stage.head is None else stage.head.out_features * head_dtype.itemsize,
        head_gradient=0 if head is None else head.nbytes,
    )


def predict_memory(
    stage: StageModel,
    activations: StageActivations,
    microbatches: Sequence[Sequence[int]],
    way: TrainingWay,
) -> StageMemory:
    """The memory of training steps of these microbatches, each given by its examples' tokens.

    Where more are held than a step has, the next step's are taken to be alike. Parameters that share storage (a tied
    head beside its embedding) have it and its moments once, and a gradient each.
    """
    leaves = list(stage.leaves().values())
    element, master = leaves[0].dtype.itemsize, torch.float32.itemsize
    num_weights = stage.weight_bytes // element
    gradients = sum(leaf.nbytes for leaf in leaves)
    sizes = [activations.held(lengths, recompute=way.recompute) for lengths in microbatches]
    largest = sorted(sizes * math.ceil(way.held / len(sizes)), reverse=True)[: way.held]
    return StageMemory(
        weights=stage.weight_bytes * way.weight_copies,
        masters=num_weights * master if element < master else 0,
        moments=way.moments * num_weights * max(master, element),
        gradients=gradients,
        shard_sums=gradients,
        activations=sum(largest) + activations.head_gradient * (way.held if way.splits else 1),
        workspace=max(activations.at_work(lengths, recompute=way.recompute) for lengths in microbatches),
    )


def _probe(part: StageModel, hidden_size: int, dtype: torch.dtype) -> LayerActivations:
    masks = LayerActivations(
        fixed=0,
        per_token=0,
        input_per_token=torch.int64.itemsize if part.is_first else hidden_size * dtype.itemsize,
        mask_element=dtype.itemsize,
        window=_window(part),
    )
    few, many = (
        _kept_bytes(part, num_tokens, hidden_size, dtype) - masks.kept([num_tokens]) for num_tokens in _PROBES
    )
    per_token = (many - few) / (_PROBES[1] - _PROBES[0])
    return replace(masks, fixed=round(few - per_token * _PROBES[0]), per_token=per_token)


def _kept_bytes(part: StageModel, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    leaves = list(part.leaves().values())
    device = leaves[0].device
    source = (
        torch.zeros((1, num_tokens), dtype=torch.int64, device=device)
        if part.is_first
        else torch.zeros((1, num_tokens, hidden_size), dtype=dtype, device=device, requires_grad=True)
    )
    saved = SavedTensors()
    saved.add(source)
    with saved.counting():
        output = part(source, torch.arange(num_tokens, device=device))
    return saved.bytes_beside([*leaves, *part.base.buffers(), output])


def _window(part: StageModel) -> int | None:
    """The layer's sliding window, in tokens."""
    config = part.base.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in kinds else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
