"""Weights of a sealed directory: what is read of them is compared with the manifest first, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lemix_common.errors import ModelError, WeightsDamaged
from lemix_common.manifest import Manifest, read_manifest
from lemix_stage_worker.model.weights import FolderWeights, TensorSpec, open_weights


@dataclass(frozen=True, slots=True)
class SealedWeights:
    """Tensors by name, whatever the cut they were written by; one of a changed file is `WeightsDamaged`."""

    manifest: Manifest
    weights: FolderWeights
    _checked: set[str] = field(default_factory=set)
    """Files that were compared."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's dtype and shape, by name."""
        return self.weights.specs

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU; files that they aren't in are neither read nor compared."""
        wanted = list(names)
        places = self.weights.places
        files = {places[name].file.name for name in wanted if name in places} - self._checked
        self.manifest.check(sorted(files))
        self._checked.update(files)
        try:
            return self.weights.read(wanted)
        except ModelError as error:
            raise WeightsDamaged(str(error)) from None


def open_sealed(directory: Path) -> SealedWeights:
    """Read the manifest of a checkpoint or published version, and its files' headers."""
    manifest = read_manifest(directory)
    try:
        return SealedWeights(manifest, open_weights(directory))
    except ModelError:
        manifest.check(manifest.files)  # it says better what is wrong
        raise WeightsDamaged(f"{directory} has other files than it was sealed with") from None
