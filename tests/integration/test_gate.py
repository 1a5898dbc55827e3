"""A version that does worse on the held-out examples is trained on and not served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from clusters import committed, fresh_broker
from lemix import Client, ScoreItem, TrainItem
from lemix.held_out import read_held_out
from lemix.model_folder import open_model_folder
from lemix_common.clock import wait_until
from lemix_common.errors import BadInput, ClusterError
from lemix_common.server import RunningBroker
from lemix_common.store.versions import Versions
from rollback_scene import Learning, learning
from tiny_model import write_tiny_llama

GOOD = ("the cat sat on", "the mat")
BAD = ("the cat sat on", "hill then")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A file of examples that nobody trains on, of the kind that is to be learned."""
    path = tmp_path / "held_out.jsonl"
    rows = [{"prompt": GOOD[0], "reference": GOOD[1]}, {"prompt": "a cat sat on", "reference": "the mat"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@contextmanager
def gated(
    server: RunningBroker, folder: Path, held_out: Path, margin: float = 0.0, **changes: object
) -> Iterator[Learning]:
    """A cluster with a gate."""
    about: dict[str, object] = {"gate_file": str(held_out), "gate_margin": margin, "learning_rate": 0.05}
    with (
        fresh_broker(server) as broker,
        learning(broker, folder, held_out.parent / "data", **(about | changes)) as running,
    ):
        yield running


def train(client: Client, example: tuple[str, str], steps: int) -> None:
    """Submit steps of nothing but this example."""
    for _ in range(2 * steps):
        client.submit(TrainItem(*example))


def loss_of(client: Client) -> float:
    """What the served version makes of the held-out examples."""
    scores = [
        client.submit(ScoreItem(*GOOD)).result(30),
        client.submit(ScoreItem("a cat sat on", "the mat")).result(30),
    ]
    return sum(-logprob for score in scores for logprob in score.logprobs) / 4


@pytest.mark.parametrize(("nodes", "stages"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_a_worse_version_is_trained_on_and_not_served(
    server: RunningBroker, folder: Path, held_out: Path, nodes: int, stages: int
) -> None:
    """The list says why; its examples are done when a later version, which is good enough, is served."""
    with gated(server, folder, held_out, nodes=nodes, stages=stages) as running:
        client, versions = running.client, Versions(running.broker)
        train(client, GOOD, 3)
        assert client.flush(30) == "0.3"
        before = loss_of(client)
        bad = [client.submit(TrainItem(*BAD)) for _ in range(2)]
        with pytest.raises(
            ClusterError, match=r"version 0\.4 was held back: its held-out loss is .* margin is 0;"
        ):
            client.flush(30)
        assert (versions.live(), committed(running.broker)) == ({"served": "0.3"}, 4)
        judged = client.versions()[0]
        assert (judged["version"], judged["verdict"], judged["parent"]) == ("0.4", "held back", "0.3")
        assert float(judged["held_out_loss"]) > before
        assert loss_of(client) == pytest.approx(before, abs=1e-6)
        assert not any(future.done() for future in bad)
        kept = running.cluster.data_dir / "versions"
        wait_until(
            lambda: [f.name for f in kept.iterdir()] == ["0.3"], what="its files are gone", timeout_s=10
        )
        while versions.live()["served"] == "0.3":
            train(client, GOOD, 1)
            with suppress(ClusterError):  # held back as well
                client.flush(30)
        served = client.versions()[0]
        assert served["verdict"] == "served"
        assert float(served["held_out_loss"]) <= before
        assert loss_of(client) == pytest.approx(float(served["held_out_loss"]), abs=1e-5)
        assert {future.result(10).weights_version for future in bad} == {served["version"]}
        assert int(served["examples"]) == 2 * (int(served["step"]) - 3)
        running.calm()
        wait_until(running.cluster.has_forgotten_items, what="nothing of the judging is left", timeout_s=5)


def test_the_margin_lets_a_little_worse_through(server: RunningBroker, folder: Path, held_out: Path) -> None:
    """By as much as was said."""
    with gated(server, folder, held_out, margin=100.0, stages=1) as running:
        train(running.client, BAD, 1)
        assert running.client.flush(30) == "0.1"
        (judged,) = running.client.versions()
        assert judged["verdict"] == "served"


def test_a_rollback_is_not_judged(server: RunningBroker, folder: Path, held_out: Path) -> None:
    """Going back was asked for by somebody; what follows is compared with what is served then."""
    with gated(server, folder, held_out, stages=1) as running:
        train(running.client, GOOD, 3)
        assert running.client.flush(30) == "0.3"
        assert running.client.rollback("0.0", 30) == "1.3"
        assert loss_of(running.client) > float(running.client.versions(20)[-1]["held_out_loss"])
        train(running.client, GOOD, 1)
        assert running.client.flush(30) == "1.4"
        judged = running.client.versions()[0]
        assert (judged["verdict"], judged["parent"]) == ("served", "1.3")


def test_a_held_out_file_is_checked_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    """The first line that can't be used is named."""
    model, path = open_model_folder(str(folder), stages=1), tmp_path / "held_out.jsonl"
    assert read_held_out("", model) == []
    for text, what in {
        "": "no rows",
        '{"prompt": "a", "reference": "cat"}\n{"prompt": "a"}\n': "held_out.jsonl:2",
        json.dumps({"prompt": "the " * 100, "reference": "cat"}): "held_out.jsonl:1",
        '{"prompt": "a", "reference": "cat"}\n' * 1001: "1001 rows",
    }.items():
        path.write_text(text, "utf-8")
        with pytest.raises(BadInput, match=what):
            read_held_out(str(path), model)
    with pytest.raises(BadInput, match="can't be read"):
        read_held_out(str(tmp_path / "none"), model)
