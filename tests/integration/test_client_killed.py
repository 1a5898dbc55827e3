"""A client's process that is killed: what was to end with it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.places import Place, on_server
from integration.scripted_worker import BYTES_TOKENIZER, MODEL
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster
from lemix_common.store.items import Items
from lemix_coordinator.coordinator import Coordinator

SOON_S = 20.0
EXPIRY_S = 0.5
STREAMING = """
from lemix import Client, GenerateItem, ScoreItem
client = Client()
client.submit(ScoreItem([1], [2], item_id="asked-for-later"))
client.submit(ScoreItem([1], [2], item_id="bound", while_connected=True))
list(client.stream_item(GenerateItem([1, 2], 5, item_id="streamed")))
"""


class NoTransitions:
    """There are no operations here."""

    def advance(self, operation: str) -> None:
        """Nothing to do."""

    def remove(self, version: str, directory: str) -> None:
        """Nothing to do."""


@pytest.fixture
def place(server: RunningBroker) -> Iterator[Place]:
    """Another process needs a real server."""
    opened = on_server(server)
    yield opened
    opened.broker.again(opened.broker.client.flushall)
    opened.broker.client.close()


@contextmanager
def coordinator(broker: Broker) -> Iterator[None]:
    """One that leads a cluster without workers, so that nothing is ever computed."""
    settings = ClusterSettings(model="m", client_expiry_s=EXPIRY_S)
    Cluster(broker).create(settings, MODEL, BYTES_TOKENIZER)
    stop = threading.Event()
    made = Coordinator("c", broker, settings, Path("/nowhere"), NoTransitions())
    thread = threading.Thread(target=made.run, args=(stop,), name="coordinator")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SOON_S)


def test_a_killed_clients_stream_is_cancelled(server: RunningBroker, broker: Broker) -> None:
    """While the process lives its stream does, however long nothing comes; killed, it takes what is bound along."""
    items, keys = Items(broker), broker.keys

    def states(wanted: str) -> bool:
        return {items.get(item)["state"] for item in ("streamed", "bound")} == {wanted}

    def has_lived_on() -> bool:
        return broker.clock.now() - float(items.get("streamed")["submitted_at"]) > 2 * EXPIRY_S

    environment = os.environ | {"LEMIX_URL": server.url, "LEMIX_CLUSTER": keys.cluster}
    with (
        coordinator(broker),
        subprocess.Popen([sys.executable, "-c", STREAMING], env=environment) as process,
    ):
        try:
            wait_until(
                lambda: bool(broker.client.exists(keys.item("streamed"))), what="it streams", timeout_s=SOON_S
            )
            wait_until(has_lived_on, what="it has lived for several expiries", timeout_s=SOON_S)
            assert states("queued")
        finally:
            process.kill()
        wait_until(lambda: states("cancelled"), what="its stream is cancelled", timeout_s=SOON_S)
    assert items.get("asked-for-later")["state"] == "queued"
    assert broker.hash(keys.totals)["cancelled"] == "2"
    assert not broker.client.keys(f"{keys.prefix}client*")
