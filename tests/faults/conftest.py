"""The model of the scenarios, and what an undisturbed run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters import fresh_broker, in_process_cluster
from faults.scenario import Load, small_model, small_settings
from lemix_common.server import RunningBroker


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return small_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def undisturbed(folder: Path, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 that training ends with when nothing happens."""
    data_dir = tmp_path_factory.mktemp("undisturbed")
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, small_settings(folder), data_dir) as (cluster, client),
    ):
        load = Load(cluster, client)
        load.train()
        load.settle()
        load.check()
        return cluster.fingerprint(0)
