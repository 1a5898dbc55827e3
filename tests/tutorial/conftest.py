"""A cluster to try things on: everything real but for the processes, which are threads here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from clusters import InProcessCluster, fresh_broker, in_process_cluster
from lemix import Client
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from tiny_model import write_tiny_llama

StartCluster = Callable[..., tuple[InProcessCluster, Client]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers that knows twenty words."""
    return write_tiny_llama(tmp_path_factory.mktemp("tutorial") / "tiny", layers=4)


@pytest.fixture
def start_cluster(model: Path, server: RunningBroker, tmp_path: Path) -> Iterator[StartCluster]:
    """What `lemix up` does, in this process; ``settings`` are its options."""
    with ExitStack() as stack:

        def start(**settings: int) -> tuple[InProcessCluster, Client]:
            chosen = ClusterSettings(model=str(model), learning_rate=1e-2, **settings)  # type: ignore[arg-type]
            broker = stack.enter_context(fresh_broker(server))
            return stack.enter_context(in_process_cluster(broker, chosen, tmp_path / broker.keys.cluster))

        yield start
