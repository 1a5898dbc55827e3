"""Whoever dies while a request is moved to a newer version: every token is of the version that the answer says."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusters import COORDINATOR, fresh_broker
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.store.versions import Versions
from mortality import KillPoint
from switch_scene import Switching, requests, switching, write_subject

QUICK = {KillPoint("move_item", "after"), KillPoint("clear_draining", "after")}
"""These run everywhere; all others with the slow tests."""


def points(*calls: str) -> list[object]:
    """Just before and just after each call."""
    return [
        pytest.param(point, marks=[] if point in QUICK else [pytest.mark.slow], id=str(point))
        for call in calls
        for when in ("before", "after")
        for point in [KillPoint(call, when)]
    ]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    return write_subject(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("point", points("move_item", "append_tokens", "complete"))
def test_a_kill_around_a_move_tears_nothing(
    subject: Path, server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: KillPoint
) -> None:
    """Stage 0's worker dies at that call: begun again, the requests go on upon the version they have then."""
    items = [*requests(on_update="rebuild"), *requests(on_update="finish")]
    with (
        fresh_broker(server) as broker,
        switching(broker, subject, tmp_path, monkeypatch, stages=2) as scene,
    ):
        held = [scene.hold(item, tokens=4) for item in items]
        scene.publish("first")
        arm(scene, scene.slot_of(held[0]), point)
        answers = [scene.finish(future) for future in held]
        assert scene.cluster.ended, "the kill point was never reached"
        for item, answer in zip(items, answers, strict=True):
            versions = [version for _, version in answer.version_spans]
            assert versions == (["0.0", "0.1"] if item.on_update == "rebuild" else ["0.0"])
            scene.check(item, answer)
        assert_left_behind(scene)


def test_a_request_that_was_lost_with_its_worker_is_begun_on_the_served_version(
    subject: Path, server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it rebuilds; from the tokens that the broker has. One that finishes begins again on the version it had."""
    items = [*requests(on_update="rebuild"), *requests(on_update="finish")]
    with (
        fresh_broker(server) as broker,
        switching(broker, subject, tmp_path, monkeypatch, stages=2) as scene,
    ):
        held = [scene.hold(item, tokens=4) for item in items]
        scene.publish("first")
        scene.cluster.replace_worker(scene.slot_of(held[0]))
        for item, future in zip(items, held, strict=True):
            answer = scene.finish(future)
            is_moved = item.on_update == "rebuild"
            assert answer.version_spans == (((0, "0.0"), (4, "0.1")) if is_moved else ((0, "0.0"),))
            scene.check(item, answer)
        assert_left_behind(scene)


@pytest.mark.parametrize("point", points("clear_draining", "move_item"))
def test_a_kill_while_a_version_is_cleared_leaves_nobody_on_it(
    subject: Path, server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: KillPoint
) -> None:
    """The coordinator dies as it says so, or stage 0 as it moves a request: the third version is served in the end."""
    items = requests(on_update="finish")
    with (
        fresh_broker(server) as broker,
        switching(broker, subject, tmp_path, monkeypatch, stages=2, max_drain_s=0.0) as scene,
    ):
        held = [scene.hold(item, tokens=4) for item in items]
        scene.publish("first")
        arm(scene, COORDINATOR if point.lua == "clear_draining" else scene.slot_of(held[0]), point)
        waiting = scene.submit_step("second")

        def is_cleared() -> bool:
            scene.cluster.replace_dead()
            return "cleared_at" in Versions(broker).version("0.0")

        wait_until(is_cleared, what="the first version must be left", timeout_s=20)
        answers = [scene.finish(future) for future in held]
        wait_until(
            lambda: scene.cluster.replace_dead() == [] and all(future.done() for future in waiting),
            what="the third version is served",
            timeout_s=30,
        )
        assert scene.cluster.ended, "the kill point was never reached"
        assert {future.result(0).weights_version for future in waiting} == {"0.2"}
        for item, answer in zip(items, answers, strict=True):
            assert [version for _, version in answer.version_spans] == ["0.0", "0.1"]
            scene.check(item, answer)
        assert_left_behind(scene)


def arm(scene: Switching, who: str, point: KillPoint) -> None:
    """Have it die at its next such call."""
    hosted = scene.cluster.coordinators[-1] if who == COORDINATOR else scene.cluster.workers[who]
    hosted.broker._calls.clear()
    hosted.broker.kill_point = point


def assert_left_behind(scene: Switching) -> None:
    """Nothing but the served version."""
    wait_until(
        lambda: (
            scene.cluster.replace_dead() == []
            and scene.cluster.has_forgotten_items()
            and scene.broker.hash(scene.broker.keys.versions_in_flight) == {}
            and "draining" not in Versions(scene.broker).live()
        ),
        what="caches, leases and older versions are gone",
        timeout_s=20,
    )
