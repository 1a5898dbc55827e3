"""One transition of an operation: read its record, do what its state asks for, compare-and-set the next state.

Every transition can be repeated: killed halfway, the next try finds the files it left and goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import structlog

from lemix_common.errors import WeightsDamaged
from lemix_common.manifest import MANIFEST, read_manifest
from lemix_common.store.gate import Gate
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.versions import Versions
from lemix_common.tensorfiles import sha256_of_file, weights_sha256
from lemix_coordinator.operations.judging import begin_judging, judge

log = structlog.get_logger()

_OUR_NAME = re.compile(r"\.writing-.*|\d+\.\d+")
LEFTOVER_S = 3600.0
"""What nobody has touched for so long, and no record names, is what a killed writer left behind."""


def advance(versions: Versions, operation: str) -> None:
    """Make the operation's next transition, if it is still due."""
    fields = versions.operation(operation)
    match fields.get("state"):
        case "requested" if fields["kind"] == "rollback":
            _begin_rollback(versions, operation, fields)
        case "requested":
            Path(fields["root"]).mkdir(parents=True, exist_ok=True)
            versions.write_shards(operation)
        case "writing":
            _seal(versions, operation, fields)
        case "preparing":
            held_out = Gate(versions.broker).held_out() if fields["kind"] == "publish" else None
            if held_out is None:
                versions.publish(operation)
            else:
                begin_judging(versions, operation, fields["version"], held_out)
        case "judging":
            held_out = Gate(versions.broker).held_out()
            if held_out is None:  # the cluster was started again, without a gate
                versions.publish(operation)
            else:
                judge(versions, operation, fields, held_out)
        case "withdrawn":
            if fields["kind"] == "publish":
                remove(fields["directory"], root=Path(fields["root"]))
            versions.advance(operation, "withdrawn", fields.get("ends_as", "failed"))
        case _:
            return
    log.info("operation_advanced", operation=operation, was=fields["state"])


def remove(directory: str, *, root: Path) -> None:
    """Remove a retired version's files; only what lies under the cluster's own folder of versions."""
    path = Path(directory)
    if path.parent == root and path.is_dir():
        shutil.rmtree(path, ignore_errors=True)


def _seal(versions: Versions, operation: str, fields: dict[str, str]) -> None:
    """Make what the stages wrote one durable, named directory, then record it."""
    written = Path(fields["directory"])
    name = operation if fields["kind"] == "fingerprint" else fields["version"]
    sealed = written.parent / name
    if not (sealed / MANIFEST).exists():
        manifest = {
            "version": fields["version"],
            "run": fields["run"],
            "step": int(fields["step"]),
            "lineage": int(fields["lineage"]),
            "optimizer": fields["optimizer"] == "1",
            "sealed_at": time.time(),
            "stages": [json.loads(fields[f"shard:{stage}"]) for stage in range(_num_shards(fields))],
            "files": {path.name: sha256_of_file(path) for path in sorted(written.glob("*.safetensors"))},
            "weights_sha256": weights_sha256(sorted(written.glob("weights-*.safetensors"))),
        }
        _write_durably(written / MANIFEST, json.dumps(manifest, indent=1))
        if sealed.exists():  # a directory without a manifest is what a kill left between these lines
            shutil.rmtree(sealed)
        written.rename(sealed)
        _sync_directory(sealed.parent)
    sha256 = json.loads((sealed / MANIFEST).read_text("utf-8"))["weights_sha256"]
    if fields["kind"] == "publish":
        versions.prepare(operation, str(sealed), sha256, written=str(written))
    else:
        versions.seal(operation, str(sealed), sha256, written=str(written))
    if written.exists():
        shutil.rmtree(written, ignore_errors=True)


def _begin_rollback(versions: Versions, operation: str, fields: dict[str, str]) -> None:
    """Read the whole checkpoint through, since from its optimizer's state on there is no other way back."""
    directory, sha256 = fields["directory"], ""
    try:
        if directory:
            manifest = read_manifest(Path(directory))
            manifest.check(manifest.files)
            sha256 = manifest.weights_sha256
    except WeightsDamaged as error:
        versions.advance(operation, "requested", "failed", {"reason": str(error)})
        return
    Rollbacks(versions.broker, fields["run"]).begin(operation, sha256)


def prune_checkpoints(rollbacks: Rollbacks, root: Path, *, keep: int, now: float) -> None:
    """Remove all but the newest checkpoints and those that are in use, and what killed writers left behind."""
    known = {version: path for version, path in rollbacks.checkpoints().items() if path}
    for version in list(known)[:-keep]:
        if directory := rollbacks.forget_checkpoint(version):
            shutil.rmtree(directory, ignore_errors=True)
    for path in root.glob("*"):
        if not _OUR_NAME.fullmatch(path.name):
            continue
        with suppress(FileNotFoundError):  # another operations worker removes it just now
            if str(path) not in known.values() and now - path.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(path, ignore_errors=True)


def _num_shards(fields: dict[str, str]) -> int:
    return sum(name.startswith("shard:") for name in fields)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
