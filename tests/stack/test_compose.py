"""The system in containers, with a real engine: from `up` over a lost worker to `down`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from containers import KINDS, compose_project, run, things_left
from lemix_common.clock import wait_until
from tiny_model import write_tiny_llama

UP_TIMEOUT_S = 400
PATIENCE_S = 120.0
PROMPT = "the cat sat"

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Stack:
    """One compose project."""

    project: dict[str, str]

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """What `docker compose …` prints; it must succeed."""
        command = ["docker", "compose", "-f", "compose/compose.yaml", *arguments]
        return run(command, self.project, timeout_s=timeout_s)

    def up(self) -> None:
        """Start what isn't running and wait until the cluster can serve."""
        wait = ["--wait", "--wait-timeout", str(UP_TIMEOUT_S)]
        self.compose("up", "--detach", *wait, "--scale", "stage-worker=2", timeout_s=UP_TIMEOUT_S + 60)

    def lemix(self, *arguments: str) -> str:
        """What `lemix …` prints in the client's container."""
        return self.compose("exec", "-T", "client", "lemix", *arguments)

    def status(self) -> Any:
        """As an object."""
        return json.loads(self.lemix("status", "--json"))

    def hosts(self) -> list[str]:
        """The containers that host the node's stages: a worker's name begins with its container's id."""
        (node,) = self.status()["nodes"]
        return [stage["worker"].partition("-")[0] for stage in node["stages"]]

    def answer(self) -> dict[str, Any]:
        """The model's own words, and of which weights they are."""
        words = ["--max-new-tokens", "8", "--ignore-eos", "--json", "--timeout", "240"]
        generation = json.loads(self.lemix("generate", PROMPT, *words))
        return {name: generation[name] for name in ("tokens", "weights_version")}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A project of one node of two stages; nothing of it is left, whatever happens."""
    model = write_tiny_llama(tmp_path / "model")
    with compose_project(
        MODEL_DIR=str(model),
        LEMIX_NODES="1",
        LEMIX_STAGES="2",
        LEMIX_WORKERS="2",
        LEMIX_STEP_EXAMPLES="2",
        LEMIX_TAKEOVER_AFTER_S="3",
    ) as project:
        yield Stack(project)


def test_from_up_to_down(stack: Stack, tmp_path: Path) -> None:
    """It serves and learns; a killed worker's stage moves; what was learned survives a stop; `down` leaves nothing."""
    stack.compose("build", timeout_s=900)
    stack.up()
    before = stack.answer()
    assert before["weights_version"] == "0.0"
    assert len(before["tokens"]) == 8
    hosts = stack.hosts()
    assert len(set(hosts)) == 2, "each stage in a container of its own"

    # it learns
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_text('{"prompt": "the cat", "reference": "sat"}\n' * 4, "utf-8")
    mount = ["--volume", f"{lessons}:/lessons.jsonl:ro"]
    stack.compose(
        "run", "--rm", "--no-deps", "-T", *mount, "client", "lemix", "train", "/lessons.jsonl", "--wait"
    )
    learned = stack.answer()
    assert learned["weights_version"] == "0.2"

    # a worker is lost for good: Docker doesn't restart what was killed
    run(["docker", "kill", hosts[1]], stack.project)
    wait_until(
        lambda: hosts[1] not in stack.hosts(), what="its stage moves", timeout_s=PATIENCE_S, interval_s=1.0
    )
    assert stack.answer() == learned
    assert set(stack.hosts()) == {hosts[0]}

    # stop and go on
    stack.compose("stop", timeout_s=300)
    stack.up()
    status = stack.status()
    assert status["training"]["checkpoint"] == status["training"]["committed"] == 2, (
        "a last checkpoint was made"
    )
    assert stack.answer() == learned

    # other settings: the workers start afresh, the weights are the same
    stack.project["LEMIX_STAGES"] = "1"
    stack.project["LEMIX_WORKERS"] = "1"
    stack.up()
    assert len(stack.hosts()) == 1
    assert stack.answer() == learned

    stack.compose("down", "--volumes", timeout_s=300)
    assert things_left(stack.project) == {kind: [] for kind in KINDS}
