"""What tests with containers share: an engine or a clear skip, and a compose project of which nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("container", "volume", "network")


@contextmanager
def compose_project(**variables: str) -> Iterator[dict[str, str]]:
    """The variables of a compose project apart from all others, image and all; skips where there is no engine."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker command here")
    for needed in (["docker", "info"], ["docker", "compose", "version"]):
        if subprocess.run(needed, capture_output=True, check=False, timeout=60).returncode:
            pytest.skip(f"no container engine: `{' '.join(needed)}` failed")
    project = f"lemix-test-{uuid.uuid4().hex[:8]}"
    own = {
        "COMPOSE_PROJECT_NAME": project,
        "DOCKER_CONFIG": os.environ.get("DOCKER_CONFIG", str(Path.home() / ".docker")),
        "IMAGE": project,
        **variables,
    }
    try:
        yield own
    finally:
        down = ["docker", "compose", "-f", "compose/compose.yaml", "down", "--volumes", "--timeout", "5"]
        for command in (down, ["docker", "image", "rm", project]):
            subprocess.run(
                command, cwd=ROOT, env=os.environ | own, capture_output=True, timeout=300, check=False
            )
        left = things_left(own)
        assert not any(left.values()), f"the project {project} left {left}"


def things_left(project: dict[str, str]) -> dict[str, list[str]]:
    """Ids of the project's containers, volumes and networks."""
    label = f"label=com.docker.compose.project={project['COMPOSE_PROJECT_NAME']}"

    def ids(kind: str) -> list[str]:
        every = ["--all"] if kind == "container" else []
        return run(["docker", kind, "ls", "--quiet", *every, "--filter", label], project).split()

    return {kind: ids(kind) for kind in KINDS}


def run(command: list[str], project: dict[str, str], *, timeout_s: float = 120) -> str:
    """Standard output of a command that must succeed, run with the project's variables."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
    ended = subprocess.run(
        command, cwd=ROOT, env=known | project, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout
