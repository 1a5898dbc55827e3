"""The model as a Hugging Face folder again: the base model's config and tokenizer with the weights published last."""

from __future__ import annotations

import shutil
from pathlib import Path

from lemix.weight_files import INDEX, SINGLE, merge, weight_files
from lemix_common.broker import Broker
from lemix_common.errors import BadInput, ClusterError, ModelError
from lemix_common.store.versions import Versions

_TRIES = 3
_ABOUT = ("*.json", "*.txt", "*.model", "*.jinja")
"""What a model folder has beside its weights: config, tokenizer, chat template."""


def export_model(broker: Broker, target: Path) -> str:
    """Write the served version to a new or empty folder; returns the version."""
    base = Path(broker.hash(broker.keys.model).get("path", ""))
    if not (base / "config.json").is_file():
        raise BadInput(
            f"{base}: the folder of the base model is not on this machine; run the export where it is"
        )
    _require_empty(target)
    for _ in range(_TRIES):
        version, folder = _served(broker)
        try:
            _write(base, weight_files(base) if folder is None else _weights_in(folder), target)
        except (FileNotFoundError, ModelError) as error:
            reason = error  # perhaps the version was retired meanwhile; the one after it is as good
        except OSError as error:
            raise BadInput(f"{target} can't be written ({error.strerror}): choose another folder") from None
        else:
            return version
    raise ClusterError(f"the weights of version {version} can't be read here: {reason}") from reason


def _served(broker: Broker) -> tuple[str, Path | None]:
    """The served version and its folder, which the model folder itself (None) stands in for before any step."""
    versions = Versions(broker)
    served = versions.live().get("served", "")
    directory = versions.version(served).get("directory", "")
    return served, Path(directory) if directory else None


def _weights_in(folder: Path) -> list[Path]:
    """A version's files; one that was gone back to is in its checkpoint's folder, beside the optimizer's state."""
    return sorted(folder.glob("weights-*.safetensors"))


def _require_empty(target: Path) -> None:
    try:
        if target.exists() and any(target.iterdir()):
            raise BadInput(f"{target} is not empty: give a new folder")
    except NotADirectoryError:
        raise BadInput(f"{target} is a file: give a new folder") from None


def _write(base: Path, weights: list[Path], target: Path) -> None:
    """Written beside and renamed, so that a folder that is there is whole."""
    if not weights:
        raise FileNotFoundError("no weight files")
    fresh = target.absolute().with_name(f".{target.absolute().name}.exporting")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for file in (file for pattern in _ABOUT for file in base.glob(pattern) if file.name != INDEX):
            shutil.copyfile(file, fresh / file.name)
        merge(weights, fresh / SINGLE)
        fresh.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
