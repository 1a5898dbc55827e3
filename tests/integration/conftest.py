"""One broker fixture, in memory and as a real server, and a cluster on it whose worker follows a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from integration.places import Place, in_memory, on_server
from integration.scripted_worker import BYTES_TOKENIZER, MODEL, ScriptedWorker
from lemix import Client
from lemix.connection import connection_over
from lemix_common.broker import Broker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster


@pytest.fixture(params=["memory", "server"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The same tests over memory and over a real server; no key outlives a test."""
    opened = in_memory() if request.param == "memory" else on_server(request.getfixturevalue("server"))
    yield opened
    opened.broker.again(opened.broker.client.flushall)
    opened.broker.client.close()


@pytest.fixture
def broker(place: Place) -> Broker:
    """An empty broker."""
    return place.broker


@pytest.fixture
def worker(broker: Broker) -> Iterator[ScriptedWorker]:
    """A cluster of one node with one stage; its worker works only when the test says so, or while it ``runs``."""
    settings = ClusterSettings(model="scripted", step_examples=2, max_queue=50)
    Cluster(broker).create(settings, MODEL, BYTES_TOKENIZER)
    scripted = ScriptedWorker(broker)
    scripted.join()
    yield scripted
    scripted.stop()


@pytest.fixture
def new_client(broker: Broker, worker: ScriptedWorker) -> Iterator[Callable[..., Client]]:
    """Makes clients of the cluster, and closes them."""
    clients: list[Client] = []

    def make(**options: object) -> Client:
        clients.append(Client(connection=connection_over(broker), **options))  # type: ignore[arg-type]
        return clients[-1]

    assert worker.is_placed
    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client: Callable[..., Client]) -> Client:
    """A client of the cluster."""
    return new_client()
