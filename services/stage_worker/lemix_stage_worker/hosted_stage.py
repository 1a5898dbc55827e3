"""One stage position on this worker: its weight versions, its requests' caches, its training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lemix_common.ids import Version
from lemix_stage_worker.model.paged_attention import KeyValueCache
from lemix_stage_worker.model.sampling import Chooser
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageCut, StageModel, build_stage
from lemix_stage_worker.sealed_weights import open_sealed
from lemix_stage_worker.trained_weights import Weights
from lemix_stage_worker.training_state import TrainingState, optimizer_name, optimizer_names
from lemix_stage_worker.weight_probe import check_answers

BASE_DIRECTORY = ""
"""What stands for the model folder where a version's directory is asked for."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Who hosts a node's stages, and where they are reached: stage to (worker, address)."""

    epoch: int
    hosts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class OpenedItem:
    """An item that rows of iterations may be of."""

    item: str
    attempt: int
    chooser: Chooser


@dataclass(eq=False)
class HostedStage:
    """A stage of a node. Owned by the compute loop."""

    node: int
    stage: int
    stages: int
    source: ModelSource
    template: StageModel
    """Meta parameters; each version is a shell of it."""
    versions: dict[str, StageModel]
    """Served versions that are resident."""
    training: TrainingState | None
    epoch: int = 0
    is_ready: bool = False
    num_blocks: int = 0
    """Of the key-value cache, on every stage of the node."""
    opened: dict[int, OpenedItem] = field(default_factory=dict)
    """By their numbers on the node."""
    cache: KeyValueCache | None = None

    @property
    def is_first(self) -> bool:
        """It has the embedding and pulls the node's items."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """It has the head."""
        return self.stage == self.stages - 1

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.source.device

    @property
    def memory_bytes(self) -> int:
        """Weights of all resident versions; what training shares with one that is as it was stored is counted once."""
        state = self.training
        trained = [state.newest, state.older] if state is not None else []
        is_packed = any(shell.is_packed for shell in self.versions.values())
        owned = sum(weights is not None and (is_packed or not weights.is_shared) for weights in trained)
        return self.template.weight_bytes * (len(self.versions) + owned)

    def open_cache(self) -> KeyValueCache:
        """The stage's keys and values; made when they are first asked for, since weights tell their type."""
        if self.cache is None:
            self.cache = KeyValueCache.of(next(iter(self.versions.values())), self.num_blocks)
        return self.cache


def build_template(source: ModelSource, stage: int, layers: tuple[range, ...]) -> StageModel:
    """The module of one stage of a cut, without values."""
    return build_stage(source, StageCut(stage, len(layers), layers[stage]))


def load_version(source: ModelSource, template: StageModel, directory: str) -> StageModel:
    """A shell with the weights of a published version (or of the model folder)."""
    if directory == BASE_DIRECTORY:
        return stage_of(source, template, source.read(template.parameter_names()))
    sealed = open_sealed(Path(directory))
    shell = stage_of(source, template, sealed.read(template.parameter_names()))
    check_answers(shell, sealed.manifest.probe, sealed.manifest.directory)
    return shell


def stage_of(source: ModelSource, template: StageModel, tensors: Mapping[str, Tensor]) -> StageModel:
    """A shell that computes on these tensors (masters are rounded), and doesn't learn."""
    shell = template.shell()
    names = template.parameter_names()
    shell.load({name: tensors[name].to(source.device, source.dtype) for name in names}, trainable=False)
    return shell


def load_training(
    source: ModelSource, template: StageModel, directory: str, version: Version, *, overlaps: bool = False
) -> TrainingState:
    """A checkpoint's training state (or the model folder's weights and a fresh optimizer) as that of ``version``."""
    if directory == BASE_DIRECTORY:
        base = _loaded(template, source.read(template.parameter_names()))
        return TrainingState(version.step, base, overlaps, lineage=version.lineage)
    weights = open_sealed(Path(directory))
    names = template.parameter_names()
    masters = _moved(weights.read(names), source.device)
    newest = _loaded(template, {name: tensor.to(source.dtype) for name, tensor in masters.items()})
    check_answers(newest.model, weights.manifest.probe, weights.manifest.directory)
    kept_names = [name for name in optimizer_names(template) if name in weights.specs]
    others = _moved(weights.read(kept_names), source.device)
    older = {name: others.pop(optimizer_name("older", name), None) for name in names}
    kept = {name: tensor for name, tensor in older.items() if tensor is not None}
    return TrainingState(
        version.step,
        newest,
        overlaps,
        older=_loaded(template, kept) if overlaps and kept else None,
        moments=others,
        masters=masters if newest.is_half else {},
        lineage=version.lineage,
    )


def training_on(
    served: StageModel, template: StageModel, version: Version, *, overlaps: bool = False
) -> TrainingState:
    """A training state that shares a served version's tensors until its first step."""
    tensors = {leaf.source: leaf.parameter.detach() for leaf in served.all_leaves()}
    weights = _loaded(template, tensors, is_shared=True)
    return TrainingState(version.step, weights, overlaps, lineage=version.lineage)


def _loaded(template: StageModel, tensors: Mapping[str, Tensor], *, is_shared: bool = False) -> Weights:
    shell = template.shell()
    shell.load(tensors)
    return Weights(shell, is_shared)


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
