"""What was published can be listed and waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters import fresh_broker, in_process_cluster
from lemix import TrainItem
from lemix_common.errors import WaitTimeout
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from tiny_model import write_tiny_llama


def test_published_versions_are_listed_with_their_parents(server: RunningBroker, tmp_path: Path) -> None:
    """Newest first, with parent, step, examples, loss and sha256; waiting for one ends when it serves."""
    model = write_tiny_llama(tmp_path / "tiny")
    settings = ClusterSettings(model=str(model), stages=2, step_examples=2, learning_rate=1e-2)
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, settings, tmp_path / "data") as (cluster, client),
    ):
        assert client.versions() == []
        for word in ("cat", "dog"):
            for future in [client.submit(TrainItem(f"the {word}", "sat")) for _ in range(2)]:
                future.result(30)
        assert client.wait_for_version("0.2", timeout=10) == "0.2"
        with pytest.raises(WaitTimeout, match=r"version 0\.3 is served"):
            client.wait_for_version("0.3", timeout=0.1)
        newest, oldest = client.versions()
        assert [newest["version"], newest["parent"], newest["step"], newest["examples"]] == [
            "0.2",
            "0.1",
            "2",
            "2",
        ]
        assert [oldest["version"], oldest["parent"]] == ["0.1", "0.0"]
        assert newest["sha256"] == cluster.fingerprint(0)
        assert float(newest["loss"]) > 0
