"""`lemix profile`: measured in a process of its own, fitted, written, stored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from lemix.cli.app import build
from lemix_common.broker import connect
from lemix_common.profile_file import read_profile
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster
from tiny_model import write_tiny_llama


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


@pytest.mark.slow
@pytest.mark.usefixtures("logs_as_before")
def test_the_command_writes_a_profile(tmp_path: Path, server: RunningBroker) -> None:
    """Into a file and into the cluster, whose model it takes; what doesn't fit the cluster is refused."""
    folder = write_tiny_llama(tmp_path / "tiny")
    broker = connect(server.url, f"profile-{time.time_ns()}", patience_s=5)
    fields = {"path": str(folder)}
    Cluster(broker).create(ClusterSettings(model=str(folder), stages=2), fields, "")
    environment = {"LEMIX_URL": server.url, "LEMIX_CLUSTER": broker.keys.cluster, "COLUMNS": "120"}
    out = tmp_path / "tiny.json"
    ended = CliRunner().invoke(build(), ["profile", "--quick", "--out", str(out), "--json"], env=environment)
    assert ended.exit_code == 0, ended.output
    profile = read_profile(out)
    assert (profile.model, profile.num_stages, profile.source) == ("tiny", 2, "measured")
    assert set(profile.held_out_error) == {"forward", "training_forward", "backward", "decode", "hop"}
    assert Cluster(broker).profile() == profile
    assert json.loads(ended.stdout)["file"] == str(out)
    refused = CliRunner().invoke(build(), ["profile", "--stages", "1"], env=environment)
    assert refused.exit_code == 2
    assert "--stages 1: the cluster has 2" in refused.output
    for key in broker.client.scan_iter(match=f"{broker.keys.prefix}*"):
        broker.client.delete(key)
    broker.client.close()


@pytest.mark.usefixtures("logs_as_before")
def test_a_model_that_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    """Without a folder, or with more stages than layers, before any process is started."""
    ended = CliRunner().invoke(build(), ["profile", "--model", str(tmp_path)], env={"LEMIX_URL": ""})
    assert ended.exit_code == 2
    assert "has no config.json" in ended.output
