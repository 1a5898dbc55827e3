"""One stage of a model: transformers' own layers, a contiguous run of them, on the meta device until values come.

A stage computes exactly what the whole model computes there: it calls the base module's own forward with the other
stages' parts taken out. Shapes: B sequences, T tokens, D hidden size, V vocabulary.

Attention is causal. Several sequences packed into one row (positions start again at 0) attend to themselves only. Keys
and values are kept by `run_paged` only, in blocks: a packed row beside transformers' own cache is silently wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lemix_common.errors import ModelError
from lemix_stage_worker.model.attention import PagedAttention
from lemix_stage_worker.model.families import Family
from lemix_stage_worker.model.skeleton import HEAD, HEAD_WEIGHT, build_skeleton
from lemix_stage_worker.model.source import ModelSource

UNSET = -77
"""A value that no computed buffer has."""
_NO_MASK = torch.empty(1, 1, 0, 0)
"""Four dimensions say that a mask was made already: transformers makes none of its own."""


@dataclass(frozen=True, slots=True)
class StageCut:
    """Which layers of the model are stage `stage` of `stages`."""

    stage: int
    stages: int
    layers: range


@dataclass(frozen=True, slots=True)
class Leaf:
    """One parameter of a stage."""

    name: str
    """Its global name; a tied head is `lm_head.weight` of its own."""
    source: str
    """The global name of the tensor its values come from."""
    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.owner, self.attribute)
        return parameter


class NoPositions(nn.Module):
    """In place of a learned position embedding: the hidden states that arrive have it already."""

    def forward(self, positions_BT: Tensor) -> Tensor:
        return torch.zeros((), device=positions_BT.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageModel:
    """The module of one stage. Values are assigned, never copied, so several shells may share tensors."""

    cut: StageCut
    family: Family
    prefix: str
    base: PreTrainedModel
    head: nn.Linear | None
    """Present on the last stage, as a leaf of its own even where its values are the embedding's."""
    is_first: bool
    tied_to: str | None
    """The global name that a tied head takes its values from; None without a tied head."""
    is_packed: bool = False
    """Its matrices are rearranged (see `packed_linear`): it only serves, and they are none of its leaves."""

    @property
    def is_last(self) -> bool:
        return self.head is not None

    @property
    def tied_head(self) -> bool:
        """This stage's head takes its values from the embedding: sum both gradients, embedding first."""
        return self.tied_to is not None

    def __call__(self, ids_or_hidden: Tensor, positions: Tensor) -> Tensor:
        """Run the layers: ids_BT on the first stage, else hidden_BTD; hidden_BTD out, after the norm on the last.

        `positions` is (T) for all rows or (B, T).
        """
        source = {"input_ids" if self.is_first else "inputs_embeds": ids_or_hidden}
        output = self.base(
            **source,
            position_ids=positions if positions.dim() == 2 else positions[None],
            past_key_values=None,
            use_cache=False,
        )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def run_paged(self, ids_or_hidden: Tensor, positions_T: Tensor, paged: PagedAttention) -> Tensor:
        """Run the layers on one row of many requests' tokens, each attending as ``paged`` says; (1, T, D) out."""
        source = {"input_ids" if self.is_first else "inputs_embeds": ids_or_hidden}
        output = self.base(
            **source,
            position_ids=positions_T[None],
            attention_mask=_NO_MASK,
            past_key_values=None,
            use_cache=False,
            paged=paged,
        )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The head's scores for any (…, D) rows of the last stage's output."""
        if self.head is None:
            raise ValueError(f"stage {self.cut.stage} of {self.cut.stages} has no head")
        logits_BTV: Tensor = self.head(hidden_BTD)
        return logits_BTV

    def parameter_names(self) -> tuple[str, ...]:
        """The global names of the tensors this stage needs, each once, in model order."""
        return tuple(dict.fromkeys(leaf.source for leaf in self._leaves()))

    def leaves(self) -> dict[str, nn.Parameter]:
        """The parameters by leaf name, in model order."""
        return {leaf.name: leaf.parameter for leaf in self._leaves()}

    def all_leaves(self) -> tuple[Leaf, ...]:
        """The parameters with their names and where their values come from, in model order."""
        return tuple(self._leaves())

    def load(self, tensors: Mapping[str, Tensor], *, trainable: bool = True) -> None:
        """Make the tensors (by global name) this stage's parameters, without a copy; others are ignored.

        A missing name or a wrong shape is a `ModelError`, and then nothing was changed.
        """
        leaves = list(self._leaves())
        for leaf in leaves:
            expected = tuple(leaf.parameter.shape)
            if leaf.source not in tensors:
                raise ModelError(f"stage {self.cut.stage} needs the tensor {leaf.source}, which is missing")
            if (found := tuple(tensors[leaf.source].shape)) != expected:
                raise ModelError(
                    f"{leaf.source} has shape {list(found)}, and the model asks for {list(expected)}"
                )
        for leaf in leaves:
            setattr(leaf.owner, leaf.attribute, nn.Parameter(tensors[leaf.source], requires_grad=trainable))

    @property
    def weight_bytes(self) -> int:
        """The size of the tensors this stage needs, a shared one counted once."""
        return sum({leaf.source: leaf.parameter.nbytes for leaf in self._leaves()}.values())

    def shell(self) -> StageModel:
        """The same stage again, without values."""
        memo: dict[int, object] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"))
            for parameter in self.leaves().values()
        }
        return replace(self, base=copy.deepcopy(self.base, memo), head=copy.deepcopy(self.head, memo))

    def parts(self, layers_per_part: int = 1) -> tuple[StageModel, ...]:
        """The stage in shorter runs of layers that share its modules and values, for training's safepoints.

        Run one after another they compute what the stage computes; what is loaded into the stage is in its parts.
        """
        layers = self.cut.layers
        starts = layers[::layers_per_part]
        return tuple(self._part(range(start, min(start + layers_per_part, layers.stop))) for start in starts)

    def _part(self, layers: range) -> StageModel:
        first, last = layers.start == self.cut.layers.start, layers.stop == self.cut.layers.stop
        local = range(layers.start - self.cut.layers.start, layers.stop - self.cut.layers.start)
        is_first, is_last = self.is_first and first, self.is_last and last
        return replace(
            self,
            cut=replace(self.cut, layers=layers),
            base=_carve(self.base, self.family, local, keep_embedding=is_first, keep_norm=is_last),
            head=self.head if is_last else None,
            is_first=is_first,
            tied_to=self.tied_to if is_last else None,
        )

    def _leaves(self) -> Iterator[Leaf]:
        for path, module in self.base.named_modules():
            for attribute, _ in module.named_parameters(recurse=False):
                name = self._global_name(f"{path}.{attribute}")
                yield Leaf(name, name, module, attribute)
        if self.head is not None:
            for attribute, _ in self.head.named_parameters():
                name = f"{HEAD}.{attribute}"
                yield Leaf(
                    name, (self.tied_to if name == HEAD_WEIGHT else None) or name, self.head, attribute
                )

    def _global_name(self, local_name: str) -> str:
        """The checkpoint's name of a base parameter: layers are numbered over the whole model there."""
        part, _, rest = local_name.partition(".")
        if part == self.family.layers:
            index, _, rest = rest.partition(".")
            part = f"{part}.{int(index) + self.cut.layers.start}"
        return f"{self.prefix}.{part}.{rest}"


def build_stage(source: ModelSource, cut: StageCut, *, attention: str | None = None) -> StageModel:
    """Build a stage: parameters on the meta device (see `StageModel.load`), computed buffers real, on its device.

    `attention` names one of transformers' attention implementations (default: SDPA where the model allows it). A cut
    that isn't of this model is a `ModelError`.
    """
    _check_cut(cut, source.num_layers)
    skeleton = build_skeleton(source.config, source.dtype, attention)
    is_first, is_last = cut.layers.start == 0, cut.layers.stop == source.num_layers
    base = _carve(skeleton.base, skeleton.family, cut.layers, keep_embedding=is_first, keep_norm=is_last)
    _number_layers(getattr(base, skeleton.family.layers))
    _compute_buffers(base, source.device)
    tied_to = skeleton.embedding_name if is_last and source.is_tied else None
    if tied_to is not None:
        skeleton.head.weight = nn.Parameter(torch.empty_like(skeleton.head.weight))
    return StageModel(
        cut=cut,
        family=skeleton.family,
        prefix=skeleton.prefix,
        base=base,
        head=skeleton.head if is_last else None,
        is_first=is_first,
        tied_to=tied_to,
    )


def _check_cut(cut: StageCut, num_layers: int) -> None:
    layers = cut.layers
    fits = 0 <= layers.start < layers.stop <= num_layers and layers.step == 1
    has_ends = (cut.stage == 0) == (layers.start == 0) and (cut.stage == cut.stages - 1) == (
        layers.stop == num_layers
    )
    if not (fits and has_ends):
        raise ModelError(
            f"stage {cut.stage} of {cut.stages} can't have layers {layers.start} to {layers.stop - 1} of {num_layers}: "
            "stages are non-empty runs, the first stage has layer 0 and the last stage the last layer"
        )


def _carve(
    base: PreTrainedModel, family: Family, layers: range, *, keep_embedding: bool, keep_norm: bool
) -> PreTrainedModel:
    """The base with only these of its layers; modules are shared, not copied."""
    carved = copy.deepcopy(base, {id(child): child for child in base.children()})
    carved.config = _carve_config(base.config, layers)
    setattr(
        carved, family.layers, nn.ModuleList(list(getattr(base, family.layers))[layers.start : layers.stop])
    )
    if not keep_embedding:
        setattr(carved, family.embedding, nn.Identity())
        if family.positions is not None:
            setattr(carved, family.positions, NoPositions())
    if not keep_norm:
        setattr(carved, family.norm, nn.Identity())
    return carved


def _carve_config(config: PreTrainedConfig, layers: range) -> PreTrainedConfig:
    carved = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        carved.layer_types = layer_types[layers.start : layers.stop]
    carved.num_hidden_layers = len(layers)
    return carved


def _number_layers(layers: nn.ModuleList) -> None:
    """Number the layers from 0, which is how they find their keys and values in the stage's cache."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index


def _compute_buffers(base: PreTrainedModel, device: torch.device) -> None:
    """Compute what no checkpoint stores (rotary frequencies), on the CPU: the same bits for every device."""
    fill_buffers: Callable[[nn.Module], None] = base._init_weights  # noqa: SLF001 - no public name computes them
    for path, module in base.named_modules():
        absent = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in absent.items():
            setattr(module, name, torch.full(buffer.shape, UNSET, dtype=buffer.dtype))
        if absent:
            fill_buffers(module)
        for name in absent:
            buffer = module.get_buffer(name)
            if buffer.eq(UNSET).any():
                raise ModelError(
                    f"models of type {base.config.model_type!r} can't be cut: nothing computes {path}.{name}"
                )
            setattr(module, name, buffer.to(device))
