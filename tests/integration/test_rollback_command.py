"""Going back on the command line, with real processes: how long it takes, and which checkpoints are kept for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import lemix
from lemix import Client
from lemix.data_dir import DataDir
from lemix.running import running_cluster
from lemix.weight_files import weight_files
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError
from lemix_common.settings import ClusterSettings
from lemix_common.tensorfiles import weights_sha256
from tiny_model import write_tiny_llama

PATIENCE_S = 30.0
SECONDS = 10.0
"""Within which a small model is back, on a busy machine."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
]  # importing torch takes a worker four seconds of a core


def test_back_within_seconds(tmp_path: Path) -> None:
    """`lemix versions` marks what can be gone back to, the newest two are kept, and `lemix rollback` goes there."""
    settings = ClusterSettings(
        model=str(write_tiny_llama(tmp_path / "tiny")),
        step_examples=2,
        checkpoint_every=1,
        keep_checkpoints=2,
    )
    directory = DataDir(tmp_path / "data")
    with running_cluster(settings, data_dir=directory.path) as url, Client(url) as client:
        for step in range(1, 5):
            client.train("the cat", "sat")
            client.train("the dog", "ran")
            assert client.flush(PATIENCE_S) == f"0.{step}"
            wait_until(
                lambda step=step: client.status()["training"]["checkpoint"] == step,  # type: ignore[misc]
                what="it has a checkpoint",
                timeout_s=PATIENCE_S,
            )
        listed = json.loads(lemix(directory, "versions", "--json").stdout)["versions"]
        assert [v["version"] for v in listed if v["checkpoint"]] == ["0.4", "0.3"]
        assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["0.3", "0.4"]
        assert "one of 0.0, 0.3, 0.4" in lemix(directory, "rollback", "0.1", status=2).stderr
        back = json.loads(lemix(directory, "rollback", "0.3", "--json").stdout)
        assert (back["version"], back["parent"]) == ("1.4", "0.3")
        assert back["seconds"] < SECONDS
        assert client.score("the cat", "sat", timeout=PATIENCE_S).weights_version == "1.4"
        newest, *_ = json.loads(lemix(directory, "versions", "--json").stdout)["versions"]
        assert (newest["version"], newest["parent"]) == ("1.4", "0.3")
        assert newest["sha256"] == next(v["sha256"] for v in listed if v["version"] == "0.3")
        out = tmp_path / "out"
        assert lemix(directory, "export", str(out)).stdout == f"version 1.4 in {out}\n"
        assert weights_sha256(weight_files(out)) == newest["sha256"]
        assert "version 2.4 serves the weights of 0.0" in lemix(directory, "rollback", "0.0").stdout
        assert "yes" in lemix(directory, "versions").stdout
        client.train("the cat", "sat")
        assert client.flush(PATIENCE_S) == "2.5"
    for folder in (directory.path / "versions" / "2.5", directory.checkpoints / "2.5"):
        with (folder / "weights-000.safetensors").open("r+b") as file:
            file.truncate(1000)
    with (
        pytest.raises(ClusterError, match=r"can't start: .*2\.5/weights-000\.safetensors"),
        running_cluster(settings, data_dir=directory.path, resume=True),
    ):
        pass
