"""A newer version is served while requests run: each goes on as it asked, and nothing is torn or held up."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from clusters import fresh_broker
from lemix import GenerateItem
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.store.versions import Versions
from numerics.subjects import GENERATED, REAL_MODELS
from switch_scene import SOON_S, Residence, requests, switching, write_subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return write_subject(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        pytest.param("llama", 1, marks=pytest.mark.slow),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        ("llama", 3),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
        pytest.param("stories260K-hf", 1, marks=pytest.mark.data),
        pytest.param("stories260K-hf", 3, marks=[pytest.mark.data, pytest.mark.slow]),
    ],
)
def test_a_running_request_finishes_or_goes_on_as_it_asked(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stages: int
) -> None:
    """``finish``: a cold run on the old version; ``rebuild``: one on the new version, from the switch on."""
    folder = write_subject(tmp_path / name, name) if name in GENERATED else REAL_MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    items = [*requests(on_update="finish"), *requests(on_update="rebuild")]
    with (
        fresh_broker(server) as broker,
        switching(broker, folder, tmp_path, monkeypatch, stages=stages) as scene,
    ):
        held = [scene.hold(item, tokens=index * 5) for index, item in enumerate(items)]
        assert scene.publish("first") == "0.1"
        answers = [scene.finish(future) for future in held]
        for index, (item, answer) in enumerate(zip(items, answers, strict=True)):
            is_moved, switch = item.on_update == "rebuild", index * 5 + 1
            assert answer.version_spans == (((0, "0.0"), (switch, "0.1")) if is_moved else ((0, "0.0"),))
            scene.check(item, answer)
            assert scene.would_differ(item, answer, switch, "0.0" if is_moved else "0.1")
        wait_until(scene.cluster.has_forgotten_items, what="caches and leases are free", timeout_s=5)
        wait_until(lambda: Versions(broker).live() == {"served": "0.1"}, what="0.0 is retired", timeout_s=5)
        assert broker.hash(broker.keys.versions_in_flight) == {}


def test_a_request_that_has_no_token_yet_is_of_the_new_version_only(
    folder: Path, server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins again: one version, one span. What the cluster's setting says goes for who doesn't ask."""
    (first, _), (second, _) = requests(on_update="rebuild"), requests(on_update=None)
    with (
        fresh_broker(server) as broker,
        switching(broker, folder, tmp_path, monkeypatch, on_update="rebuild", max_running=1) as scene,
    ):
        held = scene.hold(first, tokens=2)
        waiting = scene.client.submit(second)
        scene.publish("first")
        assert scene.finish(held).version_spans == ((0, "0.0"), (3, "0.1"))
        assert waiting.result(SOON_S).version_spans == ((0, "0.1"),)
        assert broker.hash(broker.keys.item(waiting.item_id))["on_update"] == "rebuild"
        scene.check(first, held.result(0))
        scene.check(second, waiting.result(0))


@pytest.mark.parametrize(
    ("schedule", "buffers"), [("1f1b", 3), pytest.param("a-pp", 4, marks=pytest.mark.slow)]
)
def test_a_third_version_has_the_last_requests_leave_the_first(
    folder: Path,
    server: RunningBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    buffers: int,
) -> None:
    """When it has waited long enough; no stage ever holds more than two served versions, beside what is trained."""
    residence = Residence()
    residence.install(monkeypatch)
    items = requests(on_update="finish")
    about: dict[str, Any] = {"schedule": schedule, "stages": 2, "max_drain_s": 0.0}
    with (
        fresh_broker(server) as broker,
        switching(broker, folder, tmp_path, monkeypatch, **about) as scene,
    ):
        held = [scene.hold(item, tokens=4) for item in items]
        assert scene.publish("first") == "0.1"
        assert Versions(broker).live() == {"served": "0.1", "draining": "0.0"}
        waiting = scene.submit_step("second")
        wait_until(
            lambda: all(worker.serving.cleared == "0.0" for worker in scene.workers),
            what="every worker knows that the first version must be left",
            timeout_s=SOON_S,
        )
        assert Versions(broker).live() == {"served": "0.1", "draining": "0.0"}
        answers = [scene.finish(future) for future in held]
        assert {future.result(SOON_S).weights_version for future in waiting} == {"0.2"}
        for item, answer in zip(items, answers, strict=True):
            assert answer.version_spans == ((0, "0.0"), (5, "0.1"))
            scene.check(item, answer)
            assert scene.would_differ(item, answer, 5, "0.0")
        assert residence.versions == 2
        assert residence.weight_buffers <= buffers


def test_a_move_holds_up_nobody(
    folder: Path, server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While many requests are moved, another one waits between two tokens for one of their prefills at most."""
    steady = GenerateItem([3, 4, 5], 100, ignore_eos=True, on_update="finish", item_id="steady")
    moving = [
        GenerateItem([3 + index], 60, ignore_eos=True, on_update="rebuild", item_id=f"moving-{index}")
        for index in range(6)
    ]
    with fresh_broker(server) as broker, switching(broker, folder, tmp_path, monkeypatch) as scene:
        held = [scene.hold(item, tokens=2) for item in (steady, *moving)]
        scene.publish("first")
        scene.let_go(*held)
        for item, future in zip((steady, *moving), held, strict=True):
            scene.check(item, future.result(SOON_S))
        wait_until(lambda: len(moves(spans_of(broker))) == 6, what="the moves are reported", timeout_s=5)
        between = moves_between_tokens(spans_of(broker), "steady")
        assert (sum(between), max(between)) == (6, 1)


def moves(spans: list[dict[str, Any]]) -> list[float]:
    """When each item's first step on the new version began."""
    begins: dict[str, float] = {}
    for span in spans:
        for item in items_of(span):
            if item.startswith("moving") and span["version"] == "0.1":
                begins[item] = min(span["start"], begins.get(item, span["start"]))
    return list(begins.values())


def moves_between_tokens(spans: list[dict[str, Any]], item: str) -> list[int]:
    """How many of them ran between each two decode steps of another item."""
    steps = sorted(span["start"] for span in spans if item in items_of(span) and span["cat"] == "decode")
    return [sum(before < move < after for move in moves(spans)) for before, after in pairwise(steps)]


def items_of(span: dict[str, Any]) -> list[str]:
    """Whose iteration it was."""
    return [span["item"], *span.get("others", [])]


def spans_of(broker: Broker) -> list[dict[str, Any]]:
    """What ran."""
    entries: Any = broker.client.xrange(broker.keys.events)
    return [span for _, fields in entries for span in json.loads(fields["spans"])]
