"""A cluster whose accelerators are emulated: real services, messages, steps and commits; nothing computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from clusters import InProcessCluster, fresh_broker, in_process_cluster
from lemix import Client, Future
from lemix.items import GenerateItem, ScoreItem, TrainItem
from lemix.status import read_status
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from tiny_model import write_tiny_llama
from toy_profile import STAGE, write_toy_profile

PROMPT, REFERENCE = tuple(range(3, 15)), tuple(range(5, 13))
TOKENS = len(PROMPT) + len(REFERENCE)


@contextmanager
def emulated_cluster(
    server: RunningBroker, folder: Path, **settings: Any
) -> Iterator[tuple[InProcessCluster, Client]]:
    """Two nodes of two stages of a toy accelerator."""
    model = write_tiny_llama(folder / "model")
    device = write_toy_profile(folder / "toy.json", stages=2)
    shape: dict[str, Any] = {"nodes": 2, "stages": 2, "device": device, "step_examples": 4}
    with (
        fresh_broker(server) as broker,
        in_process_cluster(
            broker, ClusterSettings(model=str(model), **(shape | settings)), folder / "data"
        ) as (cluster, client),
    ):
        yield cluster, client


def reported_spans(broker: Broker) -> list[dict[str, Any]]:
    """All that ran."""
    entries: Any = broker.client.xrange(broker.keys.events)
    return [span for _, fields in entries for span in json.loads(fields["spans"])]


def test_an_emulated_cluster_answers_and_trains(server: RunningBroker, tmp_path: Path) -> None:
    """Every item ends, steps are committed and published, and spans take the profile's time."""
    with emulated_cluster(server, tmp_path) as (cluster, client):
        scores = [client.submit(ScoreItem(PROMPT, REFERENCE)) for _ in range(12)]
        trained = [client.submit(TrainItem(PROMPT, REFERENCE)) for _ in range(8)]
        written = client.submit(GenerateItem(PROMPT, 6, ignore_eos=True))
        again = client.submit(GenerateItem(PROMPT, 6, ignore_eos=True))
        assert len({score.result(30).loss for score in scores}) == 1
        assert len(written.result(30).tokens) == len(again.result(30).tokens) == 6
        assert [example.result(30).step for example in trained] == [1] * 4 + [2] * 4
        assert cluster.fingerprint(0) == cluster.fingerprint(1)
        status = read_status(cluster.broker)
        assert any("emulated" in warning for warning in status["warnings"])
        assert {stage["memory_used_bytes"] for node in status["nodes"] for stage in node["stages"]} >= {
            STAGE.weight_bytes + STAGE.training_bytes
        }

        def scored() -> list[float]:
            return [
                span["end"] - span["start"]
                for span in reported_spans(cluster.broker)
                if span["cat"] == "prefill" and span["tokens"] == TOKENS - 1 and not span.get("others")
            ]

        wait_until(lambda: bool(scored()), what="spans are reported", timeout_s=5.0)
        expected_s = STAGE.forward.of(TOKENS - 1, (TOKENS - 1) ** 2)
        assert expected_s * 0.9 <= median(scored()) <= expected_s * 1.5


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lemix", "lemix-paper", "jsq"])
def test_a_coordinator_that_dies_takes_no_item_along(
    server: RunningBroker, tmp_path: Path, policy: str
) -> None:
    """Its successor reads what the nodes hold, and goes on: every item ends once, each example in one step."""
    with emulated_cluster(server, tmp_path, policy=policy, max_running=2) as (cluster, client):
        futures: list[Future[Any]] = []
        for number in range(60):
            futures.append(client.submit(ScoreItem(PROMPT, REFERENCE)))
            if number % 3 == 0:
                futures.append(client.submit(TrainItem(PROMPT, REFERENCE)))
            if number in (20, 40):
                wait_until(lambda: any(future.done() for future in futures), what="an answer", timeout_s=20.0)
                cluster.replace_coordinator()
        client.flush(30)
        for future in futures:
            future.result(30)
        keys = cluster.broker.keys
        totals = cluster.broker.hash(keys.totals)
        assert (int(totals["done"]), int(totals["open"])) == (80, 0)
        assert read_status(cluster.broker)["slo_attainment"] is not None


def test_what_is_expected_of_an_item_stands_in_its_hash(server: RunningBroker, tmp_path: Path) -> None:
    """When it should end, and until when it is to; the share that kept it is shown."""
    with emulated_cluster(server, tmp_path, policy="jsq") as (cluster, client):
        before = cluster.broker.clock.now()
        scores = [client.submit(ScoreItem(PROMPT, REFERENCE, item_id=f"s{number}")) for number in range(3)]
        for score in scores:
            score.result(30)
        fields = cluster.broker.hash(cluster.broker.keys.item("s0"))
        alone_s = 2 * STAGE.forward.of(TOKENS, TOKENS**2)
        assert before + alone_s * 0.9 <= float(fields["predicted_end_at"]) <= before + 2 * alone_s + 1.0
        assert float(fields["slo_s"]) >= 5 * alone_s
        assert read_status(cluster.broker)["slo_attainment"] is not None
