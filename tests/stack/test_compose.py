"""The system in containers, with a real engine: from `up` over a lost worker to `down`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lemix_common.clock import wait_until
from tiny_model import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
UP_TIMEOUT_S = 300
PATIENCE_S = 90.0
PROMPT = "the cat sat"

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Stack:
    """One compose project, apart from all others of this machine."""

    project: str
    environment: dict[str, str]

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        """What `docker compose …` prints; it must succeed."""
        return run(
            ["docker", "compose", "-f", "compose/compose.yaml", *arguments],
            self.environment,
            timeout_s=timeout_s,
        )

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
        generation = json.loads(
            self.lemix(
                "generate", PROMPT, "--max-new-tokens", "8", "--ignore-eos", "--json", "--timeout", "60"
            )
        )
        return {name: generation[name] for name in ("tokens", "weights_version")}

    def left(self, kind: str) -> str:
        """Containers, volumes or networks of this project."""
        every = ["--all"] if kind == "container" else []
        label = f"label=com.docker.compose.project={self.project}"
        return run(["docker", kind, "ls", "--quiet", *every, "--filter", label], self.environment)


def run(command: list[str], environment: dict[str, str], *, timeout_s: float = 120) -> str:
    """Standard output of a command that must succeed."""
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A project of one node of two stages; nothing of it is left, whatever happens."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker command here")
    for needed in (["docker", "info"], ["docker", "compose", "version"]):
        if subprocess.run(needed, capture_output=True, check=False, timeout=60).returncode:
            pytest.skip(f"no container engine: `{' '.join(needed)}` failed")
    model = write_tiny_llama(tmp_path / "model")
    project = f"lemix-test-{uuid.uuid4().hex[:8]}"
    known = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
    stack = Stack(
        project,
        known
        | {
            "COMPOSE_PROJECT_NAME": project,
            "IMAGE": project,
            "MODEL_DIR": str(model),
            "LEMIX_NODES": "1",
            "LEMIX_STAGES": "2",
            "LEMIX_WORKERS": "2",
            "LEMIX_STEP_EXAMPLES": "2",
            "LEMIX_TAKEOVER_AFTER_S": "3",
        },
    )
    try:
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5", timeout_s=300)
        subprocess.run(["docker", "image", "rm", project], capture_output=True, check=False, timeout=120)


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
    stack.compose("run", "--rm", "-T", *mount, "client", "lemix", "train", "/lessons.jsonl", "--wait")
    learned = stack.answer()
    assert learned["weights_version"] == "0.2"

    # a worker is lost for good: Docker doesn't restart what was killed
    run(["docker", "kill", hosts[1]], stack.environment)
    wait_until(
        lambda: hosts[1] not in stack.hosts(),
        what="its stage was taken",
        timeout_s=PATIENCE_S,
        interval_s=1.0,
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

    stack.compose("down", "--volumes", timeout_s=300)
    assert {kind: stack.left(kind) for kind in ("container", "volume", "network")} == {
        "container": "",
        "volume": "",
        "network": "",
    }
