"""A cluster whose processes somebody else starts: published, joined in any order, changed, closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from integration.scripted_worker import BYTES_TOKENIZER, MODEL
from lemix.creation import create_cluster
from lemix.data_dir import DataDir
from lemix.discovery import find_cluster
from lemix.model_folder import ModelFolder, open_model_folder
from lemix.running import stop_cluster
from lemix_common.broker import Broker, connect
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, BrokerUnsuitable, Fenced, ModelError
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.joining import join_cluster
from lemix_common.store.versions import Versions
from lemix_coordinator.closing import StopRequests, close_when_asked
from lemix_coordinator.coordinator import Coordinator
from tiny_model import write_tiny_llama
from toy_profile import toy_profile

PATIENCE_S = 10.0
SETTINGS = ClusterSettings(model="m", nodes=2, stages=2)


class NoTransitions:
    """Nothing is asked of operations workers."""

    def advance(self, operation: str) -> None:
        """Nobody does."""

    def remove(self, version: str, directory: str) -> None:
        """Nobody does."""


def publish(broker: Broker, settings: ClusterSettings = SETTINGS) -> Cluster:
    """Settings and a model that nobody opens."""
    cluster = Cluster(broker)
    cluster.create(settings, MODEL, BYTES_TOKENIZER)
    return cluster


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    """A real one, of two layers."""
    return open_model_folder(str(write_tiny_llama(tmp_path / "model")), stages=2)


# ------------------------------------------------------------------------------------------------------- creation
def test_creating_again_changes_nothing(broker: Broker) -> None:
    """So each start of a coordinator's container may do it: who leads and who works goes on."""
    cluster = publish(broker)
    generation = cluster.state()["generation"]
    cluster.register("w", {"slot": "w", "generation": generation}, expiry_s=60)
    assert cluster.lead("c", expiry_s=60) == 1
    publish(broker)
    assert cluster.state()["generation"] == generation
    assert "alive" in cluster.workers()["w"]
    assert cluster.lead("c", expiry_s=60) == 1


def test_other_settings_are_another_generation(broker: Broker) -> None:
    """Workers of the old one are forgotten and refused, since they may hold other layers; new ones are taken."""
    cluster = publish(broker)
    old = cluster.state()["generation"]
    cluster.register("w", {"slot": "w", "generation": old}, expiry_s=60)
    publish(broker, replace(SETTINGS, stages=1))
    assert cluster.workers() == {}
    assert not cluster.beat("w", 1, expiry_s=60)
    with pytest.raises(Fenced, match="other settings"):
        cluster.register("w", {"slot": "w", "generation": old}, expiry_s=60)
    cluster.register("w2", {"slot": "w", "generation": cluster.state()["generation"]}, expiry_s=60)
    assert list(cluster.workers()) == ["w2"]


def test_an_emulated_profile_does_not_outlive_its_accelerators(broker: Broker) -> None:
    """What computes itself afterwards isn't predicted by it; a measured profile stays."""
    cluster = publish(broker, replace(SETTINGS, device="emulated:p.json"))
    cluster.publish_profile(toy_profile(2))
    publish(broker, replace(SETTINGS, device="emulated:p.json"))
    assert cluster.profile() is not None
    publish(broker, SETTINGS)
    assert cluster.profile() is None
    cluster.publish_profile(toy_profile(2))
    publish(broker, replace(SETTINGS, device="cuda"))
    assert cluster.profile() is not None


def test_a_coordinator_of_other_settings_ends(broker: Broker, tmp_path: Path) -> None:
    """It is fenced, and doesn't take the lead again; whoever starts it again has it read the new ones."""
    publish(broker)
    coordinator = Coordinator("c", broker, SETTINGS, tmp_path, NoTransitions())
    running = threading.Thread(target=coordinator.run, args=(threading.Event(),), daemon=True)
    running.start()
    wait_until(lambda: coordinator.epoch > 0, what="it leads", timeout_s=PATIENCE_S)
    publish(broker, replace(SETTINGS, stages=1))
    running.join(PATIENCE_S)
    assert not running.is_alive()
    assert broker.client.get(broker.keys.leader) is None


def test_clients_find_a_created_cluster(broker: Broker, model: ModelFolder, tmp_path: Path) -> None:
    """By its data directory, as one that `lemix up` started; `lemix down` leaves it to whoever did."""
    directory = DataDir(tmp_path / "data")
    settings = ClusterSettings(model=str(model.path), stages=2)
    for _ in range(2):
        create_cluster(broker, "redis://somewhere", settings, model, directory)
    assert find_cluster(None, None, {"LEMIX_DATA_DIR": str(directory.path)}).url == "redis://somewhere"
    assert Cluster(broker).settings() == settings
    with pytest.raises(BadInput, match="was not started by `lemix up`"):
        stop_cluster(directory)
    assert directory.announced().url == "redis://somewhere"


def test_a_cluster_goes_on_with_its_model_only(broker: Broker, model: ModelFolder, tmp_path: Path) -> None:
    """What was learned means nothing to another one; nothing is published then."""
    publish(broker)
    with pytest.raises(ModelError, match="is another model"):
        create_cluster(broker, "redis://x", ClusterSettings(stages=2), model, DataDir(tmp_path / "data"))
    assert Cluster(broker).settings() == SETTINGS


def test_a_node_with_items_is_not_given_up(broker: Broker, model: ModelFolder, tmp_path: Path) -> None:
    """Fewer nodes than before are refused as long as one of the others has work: it would never end."""
    directory = DataDir(tmp_path / "data")
    two = ClusterSettings(nodes=2, stages=2)
    create_cluster(broker, "redis://x", two, model, directory)
    broker.client.xadd(broker.keys.work(1), {"item": "a"})
    with pytest.raises(BadInput, match="node 1 still has 1 items"):
        create_cluster(broker, "redis://x", replace(two, nodes=1), model, directory)
    broker.client.xtrim(broker.keys.work(1), maxlen=0)
    create_cluster(broker, "redis://x", replace(two, nodes=1), model, directory)
    assert Cluster(broker).settings().nodes == 1


def test_create_on_the_command_line(server: RunningBroker, model: ModelFolder, tmp_path: Path) -> None:
    """What a coordinator's container runs first; without workers `status --check` fails."""

    def lemix(*arguments: str) -> subprocess.CompletedProcess[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
        environment = known | {"LEMIX_DATA_DIR": str(tmp_path / "data")}
        return subprocess.run(
            [sys.executable, "-m", "lemix", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    create = ("create", "--model", str(model.path), "--stages", "2", "--cluster", "created")
    refused = lemix(*create)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "give the --url of a running broker" in refused.stderr
    created = lemix(*create, "--url", server.url)
    assert created.returncode == 0, created.stderr
    assert "cluster created: 1 nodes x 2 stages" in created.stdout
    assert server.password not in created.stdout
    checked = lemix("status", "--check", "--json")
    assert (checked.returncode, json.loads(checked.stdout)["cluster"]) == (3, "created")
    broker = connect(server.url, "created")
    broker.client.flushall()
    broker.client.close()


# -------------------------------------------------------------------------------------------------------- joining
def test_a_process_waits_for_the_cluster(server: RunningBroker) -> None:
    """It says what it waits for, once in a while, and goes on when the cluster is there."""
    with ThreadPoolExecutor(1) as pool, capture_logs() as logs:
        joining = pool.submit(join_cluster, server.url, "late", threading.Event())
        wait_until(lambda: bool(logs), what="it says so", timeout_s=PATIENCE_S)
        assert not joining.done()
        publisher = connect(server.url, "late")
        publish(publisher)
        joined = joining.result(PATIENCE_S)
    assert [(line["event"], "no cluster 'late'" in line["reason"]) for line in logs] == [("waiting", True)]
    assert joined is not None
    assert Cluster(joined).settings() == SETTINGS
    for broker in (joined, publisher):
        broker.client.flushall()
        broker.client.close()


def test_a_process_waits_for_the_broker_until_it_is_told_to_stop() -> None:
    """Nobody is there: it waits, and SIGTERM ends that."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool, capture_logs() as logs:
        joining = pool.submit(join_cluster, "redis://127.0.0.1:1/0", "lemix", stop)
        wait_until(lambda: bool(logs), what="it says so", timeout_s=PATIENCE_S)
        assert not joining.done()
        stop.set()
        assert joining.result(PATIENCE_S) is None
    assert "no Redis or Valkey answers there" in logs[0]["reason"]


def test_a_wrong_password_is_not_waited_for(server: RunningBroker) -> None:
    """It doesn't get better."""
    with pytest.raises(BrokerUnsuitable, match="password"):
        join_cluster(server.url.replace(server.password, "wrong"), "lemix", threading.Event())


# -------------------------------------------------------------------------------------------------------- closing
def closing(broker: Broker, leader: str, tmp_path: Path) -> tuple[StopRequests, threading.Event]:
    """What ``c`` does when it is asked to stop while a committed step is in no checkpoint."""
    publish(broker)
    broker.client.hset(broker.keys.run(MAIN_RUN), "committed", 1)
    Cluster(broker).lead(leader, expiry_s=60)
    requests = StopRequests()
    return requests, close_when_asked("c", requests, replace(broker, patience_s=0), tmp_path)


def test_the_leader_makes_a_last_checkpoint_before_it_ends(broker: Broker, tmp_path: Path) -> None:
    """It takes nothing new, and goes on leading until the checkpoint is sealed."""
    requests, is_over = closing(broker, "c", tmp_path)
    assert not is_over.is_set()
    requests.note(15, None)
    versions = Versions(broker)
    wait_until(lambda: bool(versions.in_progress()), what="a checkpoint is asked for", timeout_s=PATIENCE_S)
    ((operation, fields),) = versions.in_progress().items()
    assert (fields["kind"], fields["root"]) == ("checkpoint", str(tmp_path / "checkpoints"))
    assert Cluster(broker).state()["state"] == "stopping"
    assert not is_over.is_set()
    broker.client.hset(broker.keys.operation(operation), "state", "sealed")
    assert is_over.wait(PATIENCE_S)


def test_a_second_request_ends_it_at_once(broker: Broker, tmp_path: Path) -> None:
    """As at a terminal."""
    requests, is_over = closing(broker, "c", tmp_path)
    requests.note(15, None)
    wait_until(lambda: bool(Versions(broker).in_progress()), what="it waits", timeout_s=PATIENCE_S)
    requests.note(15, None)
    assert is_over.wait(PATIENCE_S)


def test_who_stands_by_just_ends(broker: Broker, tmp_path: Path) -> None:
    """The cluster goes on under its leader."""
    requests, is_over = closing(broker, "another", tmp_path)
    requests.note(15, None)
    assert is_over.wait(PATIENCE_S)
    assert Cluster(broker).state()["state"] == "running"
    assert not Versions(broker).in_progress()


def test_late_steps_begin_where_a_checkpoint_is(broker: Broker, model: ModelFolder, tmp_path: Path) -> None:
    """Steps that a checkpoint doesn't cover would be replayed otherwise than they were computed: refused."""
    directory, settings = DataDir(tmp_path / "data"), ClusterSettings(stages=2)
    late = replace(settings, schedule="a-pp")
    create_cluster(broker, "redis://x", settings, model, directory)
    run = broker.keys.run(MAIN_RUN)
    broker.client.hset(run, mapping={"planned": 7, "committed": 7, "checkpoint": 5})
    with pytest.raises(BadInput, match="steps 6 to 7 are in no checkpoint"):
        create_cluster(broker, "redis://x", late, model, directory)
    create_cluster(broker, "redis://x", replace(settings, schedule="gpipe"), model, directory)
    assert broker.client.hget(run, "base") is None
    broker.client.hset(run, "checkpoint", 7)
    create_cluster(broker, "redis://x", late, model, directory)
    assert broker.client.hget(run, "base") == "7"
