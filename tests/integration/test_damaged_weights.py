"""Checkpoints that aren't what was sealed are refused, whatever was done to them, and nothing is changed by that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clusters import fresh_broker
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError
from lemix_common.manifest import MANIFEST
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from lemix_common.tensorfiles import sha256_of_file, weights_sha256
from rollback_scene import learning
from tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=4)


def truncate(path: Path) -> None:
    """Its last bytes are gone."""
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    """One bit, in the middle of a tensor."""
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    """With the other stage's file."""
    other = path.with_name(path.name.replace("000", "001"))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def of_another_version(path: Path) -> None:
    """The whole directory, manifest included."""
    for file in (path.parent.parent / "0.1").iterdir():
        shutil.copy(file, path.parent / file.name)


def lose(path: Path) -> None:
    """The file isn't there."""
    path.unlink()


def transpose(path: Path) -> None:
    """A square weight, and the manifest is made to agree."""
    tensors = load_file(path)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path)
    manifest = json.loads((path.parent / MANIFEST).read_text("utf-8"))
    manifest["files"][path.name] = sha256_of_file(path)
    manifest["weights_sha256"] = weights_sha256(path.parent.glob("weights-*.safetensors"))
    (path.parent / MANIFEST).write_text(json.dumps(manifest), "utf-8")


Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "truncated": (truncate, "weights-000.safetensors", "weights-000"),
    "bit-flipped": (flip, "weights-001.safetensors", "weights-001"),
    "optimizer-bit-flipped": (flip, "optimizer-000.safetensors", "optimizer-000"),
    "stages-swapped": (swap, "weights-000.safetensors", "weights-00"),
    "another-version": (of_another_version, MANIFEST, "holds version 0.1, not 0.2"),
    "lost": (lose, "optimizer-001.safetensors", "optimizer-001"),
    "manifest-truncated": (truncate, MANIFEST, MANIFEST),
    "transposed": (transpose, "weights-000.safetensors", "layer 1 "),
}
"""What is done, to which file, and what the refusal must name."""
QUICK = {"transposed"}


def test_a_damaged_checkpoint_is_not_gone_back_to(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """The refusal names the file; what was served is served, training goes on, and an intact checkpoint will do."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=2) as back:
        for name in ("first", "second"):
            back.learn(name, 1)
            directory = back.checkpoint()
        back.learn("third", 1)
        whole = tmp_path / "whole"
        shutil.copytree(directory, whole)
        for damage, file, reason in DAMAGES.values():
            damage(directory / file)
            with pytest.raises(ClusterError, match=f"nothing was changed.*{reason}"):
                back.client.rollback("0.2", 30)
            assert Versions(broker).live()["served"] == "0.3"
            shutil.rmtree(directory)
            shutil.copytree(whole, directory)
        back.learn("fourth", 1)
        assert Versions(broker).live()["served"] == "0.4"
        assert (
            back.client.rollback("0.2", 30) == "2.4"
        )  # lineage 1 got as far as the stages, and no number comes twice


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGES],
)
def test_a_damaged_checkpoint_is_not_resumed_from(
    folder: Path, server: RunningBroker, tmp_path: Path, kind: str
) -> None:
    """Serving goes on with what was published; training stands still, says why, and goes on from an older one."""
    damage, file, reason = DAMAGES[kind]
    with fresh_broker(server) as broker:
        with learning(broker, folder, tmp_path, stages=2) as before:
            for name in ("first", "second"):
                before.learn(name, 1)
                directory = before.checkpoint()
        damage(directory / file)
        with learning(broker, folder, tmp_path, stages=2) as after:
            training = Training(broker, MAIN_RUN)
            wait_until(lambda: training.state().refused != "", what="it is refused", timeout_s=20)
            refused = training.state().refused
            assert reason in refused
            assert "`lemix rollback 0.1`" in refused
            assert after.client.score([3, 4], [5], timeout=30).weights_version == "0.2"
            assert after.client.rollback("0.1", 30) == "1.2"
            assert [trained.step for trained in after.learn("third", 1)] == [3, 3]
            assert training.state().refused == ""


def test_a_served_version_that_is_damaged_is_taken_from_its_checkpoint(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """Equal versions have equal bits; without a checkpoint the cluster can't start, and says which file it is."""
    with fresh_broker(server) as broker:
        with learning(broker, folder, tmp_path, stages=2) as before:
            before.learn("first", 1)
            before.checkpoint()
            expected = before.client.score([3, 4], [5, 6], timeout=30).logprobs
        flip(tmp_path / "versions" / "0.1" / "weights-000.safetensors")
        with learning(broker, folder, tmp_path, stages=2) as after:
            score = after.client.score([3, 4], [5, 6], timeout=30)
            assert (score.weights_version, score.logprobs) == ("0.1", expected)
