"""One stage position on this worker: its weight versions, its requests' caches, its training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import DynamicCache

from lemix_common.ids import Version
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


@dataclass(frozen=True, slots=True)
class CacheKey:
    """A cache belongs to one attempt at one item, and to the version that computed it."""

    item: str
    attempt: int
    version: str


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
    caches: dict[CacheKey, DynamicCache] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """It has the embedding and pulls the node's items."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """It has the head."""
        return self.stage == self.stages - 1

    @property
    def memory_bytes(self) -> int:
        """Weights of all resident versions; one that training shares is counted once."""
        state = self.training
        trained = [state.newest, state.older] if state is not None else []
        owned = sum(weights is not None and not weights.is_shared for weights in trained)
        return self.template.weight_bytes * (len(self.versions) + owned)

    def open_cache(self, key: CacheKey) -> bool:
        """Make the item's only cache on this stage; whether that replaces one of the same attempt.

        A version that isn't resident fails when its step runs.
        """
        is_rebuilt = any((held.item, held.attempt) == (key.item, key.attempt) for held in self.caches)
        self.drop_caches(key.item)
        if key.version in self.versions:
            self.caches[key] = self.versions[key.version].new_cache()
        return is_rebuilt

    def drop_caches(self, item: str) -> None:
        """Free what the item holds, whatever the attempt and version."""
        self.caches = {key: cache for key, cache in self.caches.items() if key.item != item}


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
    shell.load({name: tensors[name].to(source.dtype) for name in names}, trainable=False)
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
    masters = weights.read(names)
    newest = _loaded(template, {name: tensor.to(source.dtype) for name, tensor in masters.items()})
    check_answers(newest.model, weights.manifest.probe, weights.manifest.directory)
    others = weights.read([name for name in optimizer_names(template) if name in weights.specs])
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
