"""What a sealed directory of weights says of itself, and whether its files are still those that were sealed.

A directory is sealed by its ``manifest.json``, written last. It carries the name of the version that it holds; every
file is named there with its sha256. So a file that was cut off, changed, or put there from another stage or another
version is found before anything is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemix_common.errors import WeightsDamaged
from lemix_common.tensorfiles import sha256_of_file

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A sealed directory's own words; `WeightsDamaged` where it isn't as they say."""

    directory: Path
    version: str
    files: Mapping[str, str]
    """sha256 by file name."""
    weights_sha256: str
    probe: Mapping[int, tuple[float, ...]]
    """What each layer answered to a fixed input when it was sealed; empty where that wasn't asked."""

    def check(self, names: Iterable[str]) -> None:
        """Read these files through and compare them."""
        for name in names:
            path = self.directory / name
            if name not in self.files:
                raise WeightsDamaged(
                    f"{path} is none of the files that version {self.version} was sealed with"
                )
            try:
                is_same = sha256_of_file(path) == self.files[name]
            except OSError as error:
                raise WeightsDamaged(f"{path} can't be read ({error.strerror})") from None
            if not is_same:
                raise WeightsDamaged(
                    f"{path} was changed since version {self.version} was sealed (another sha256)"
                )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a sealed directory, which has the name of its version and every file that it was sealed with."""
    path = directory / MANIFEST
    try:
        fields: Any = json.loads(path.read_text("utf-8"))
        manifest = Manifest(
            directory=directory,
            version=str(fields["version"]),
            files={str(name): str(sha256) for name, sha256 in fields["files"].items()},
            weights_sha256=str(fields["weights_sha256"]),
            probe={
                int(layer): tuple(map(float, answer))
                for stage in fields["stages"]
                for layer, answer in stage.get("probe", {}).items()
            },
        )
    except OSError as error:
        raise WeightsDamaged(f"{path} can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsDamaged(f"{path} is no manifest (any more): {type(error).__name__} {error}") from None
    if manifest.version != directory.name:
        raise WeightsDamaged(f"{directory} holds version {manifest.version}, not {directory.name}")
    if missing := [name for name in manifest.files if not (directory / name).is_file()]:
        raise WeightsDamaged(f"{directory / missing[0]} is missing")
    return manifest
