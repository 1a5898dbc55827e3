"""Going back to a checkpoint: the weights are its weights, training goes on as if what came after had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters import committed, fresh_broker
from lemix import GenerateItem
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from rollback_scene import learning
from tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=4)


@pytest.mark.parametrize(("nodes", "stages"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_training_goes_on_as_if_the_steps_in_between_had_not_been(
    folder: Path, server: RunningBroker, tmp_path: Path, nodes: int, stages: int
) -> None:
    """The same bits as of a run that never made them, optimizer included; steps are counted on."""
    with (
        fresh_broker(server) as broker,
        learning(broker, folder, tmp_path / "back", nodes=nodes, stages=stages) as back,
    ):
        back.learn("kept", 3)
        back.checkpoint()
        kept = back.served_sha256()
        back.learn("left", 2)
        assert back.served_sha256() != kept
        assert back.client.rollback("0.3", 30) == "1.5"
        assert Versions(broker).live()["served"] == "1.5"
        assert back.served_sha256() == kept
        back.calm()
        assert {back.cluster.fingerprint(node) for node in range(nodes)} == {kept}
        assert [trained.step for trained in back.learn("after", 2)] == [6, 6, 7, 7]
        versions = [(fields["version"], fields["parent"]) for fields in back.client.versions(3)]
        assert versions[0][0] == "1.7"
        assert ("1.5", "0.3") in [(f["version"], f["parent"]) for f in Versions(broker).published(20)]
        weights = {back.cluster.fingerprint(node) for node in range(nodes)}
    with (
        fresh_broker(server) as broker,
        learning(broker, folder, tmp_path / "straight") as straight,
    ):
        straight.learn("kept", 3)
        straight.learn("after", 2)
        assert weights == {straight.cluster.fingerprint(0)}


def test_the_model_itself_can_be_gone_back_to(folder: Path, server: RunningBroker, tmp_path: Path) -> None:
    """As version 0.0, with a fresh optimizer; and from there forth again to a checkpoint of the lineage before."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=2) as back:
        untrained = back.cluster.fingerprint(0)
        back.learn("kept", 2)
        back.checkpoint()
        trained = back.served_sha256()
        assert back.client.rollback("0.0", 30) == "1.2"
        back.calm()
        assert back.cluster.fingerprint(0) == untrained
        assert back.client.rollback("0.2", 30) == "2.2"
        back.calm()
        assert (back.served_sha256(), back.cluster.fingerprint(0)) == (trained, trained)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="float32", marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"schedule": "a-pp", "step_examples": 2}, id="a-pp"),
    ],
)
def test_a_cluster_goes_on_from_what_it_had_gone_back_to(
    folder: Path, server: RunningBroker, tmp_path: Path, settings: dict[str, object]
) -> None:
    """All processes are others: version and training state are those of the checkpoint, under their new name."""
    with fresh_broker(server) as broker:
        with learning(broker, folder, tmp_path, stages=2, **settings) as before:
            before.learn("kept", 1)
            before.checkpoint()
            kept = before.served_sha256()
            before.learn("left", 1)
            assert before.client.rollback("0.1", 30) == "1.2"
        with learning(broker, folder, tmp_path, stages=1, **settings) as after:
            after.calm()
            assert after.client.score([3, 4], [5], timeout=30).weights_version == "1.2"
            assert after.cluster.fingerprint(0) == kept
            assert [trained.step for trained in after.learn("after", 1)] == [3, 3]


def test_a_request_finishes_on_the_version_it_began_with(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """It is neither broken off nor mixed; the next one is served by what was gone back to."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=2) as back:
        back.learn("kept", 1)
        back.checkpoint()
        back.learn("left", 1)
        before = back.client.generate([3, 4], 40, ignore_eos=True, timeout=30)
        running = back.client.submit(GenerateItem([3, 4], 40, ignore_eos=True))
        wait_until(
            lambda: back.broker.hash(broker.keys.item(running.item_id))["state"] == "running",
            what="the request is in work",
            timeout_s=10,
        )
        assert back.client.rollback("0.1", 30) == "1.2"
        assert running.result(30).weights_version == "0.2"
        assert running.result(30).tokens == before.tokens
        assert back.client.generate([3, 4], 2, timeout=30).weights_version == "1.2"


def test_what_was_planned_goes_on_upon_the_weights_that_were_gone_back_to(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """In the middle of training: every example ends as done, each step is committed once, and none is left over."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=2) as back:
        back.learn("kept", 1)
        back.checkpoint()
        futures = back.submit("on", 12)
        wait_until(lambda: committed(broker) >= 4, what="some steps are committed", timeout_s=20)
        version = back.client.rollback("0.1", 30)
        steps = [future.result(60).step for future in futures]
        assert steps == [2 + index // 2 for index in range(24)]
        back.calm()
        run = Training(broker, MAIN_RUN).state()
        assert (run.committed, run.published, run.lineage) == (13, 13, 1)
        assert version.startswith("1.")
        assert 4 <= int(version[2:]) <= 13
        assert back.served_sha256() == back.cluster.fingerprint(0)
        assert (broker.hash(broker.keys.totals)["done"], broker.hash(broker.keys.totals)["open"]) == (
            "26",
            "0",
        )


def test_only_what_has_a_checkpoint_can_be_gone_back_to(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """The refusal names those that do; the list of versions marks them."""
    with fresh_broker(server) as broker, learning(broker, folder, tmp_path, stages=1) as back:
        back.learn("kept", 1)
        directory = back.checkpoint()
        back.learn("more", 1)
        with pytest.raises(BadInput, match=r"version 0\.2 has no checkpoint.*one of 0\.0, 0\.1"):
            back.client.rollback("0.2", 30)
        with pytest.raises(BadInput, match="not a weight version"):
            back.client.rollback("latest", 30)
        marked = {fields["version"]: fields["checkpoint"] for fields in back.client.versions()}
        assert marked == {"0.2": "", "0.1": str(directory)}
