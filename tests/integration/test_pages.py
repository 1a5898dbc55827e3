"""The commands of README and docs/, run as they are printed: in a copy of the tree, with an empty home."""

from __future__ import annotations

from pathlib import Path

import pytest

from containers import compose_project
from fences import OF_A_CLUSTER, Fence, fences_of, run
from tiny_model import write_tiny_llama

FENCES = [fence for fence in fences_of() if fence.is_command and OF_A_CLUSTER not in fence.marks]


def pages_with(mark: str) -> list[str]:
    """Pages that have blocks with this mark."""
    return sorted({fence.page for fence in FENCES if mark in fence.marks})


def blocks_of(page: str, mark: str) -> list[Fence]:
    """A page's blocks with this mark, and the quick ones between them, which they may build on."""
    return [fence for fence in FENCES if fence.page == page and {mark, "test"} & set(fence.marks)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", pages_with("test"))
def test_quick_commands_run(page: str, tmp_path: Path) -> None:
    """What is marked `test` works as printed, and the page stops what it started."""
    check(page, "test", tmp_path, timeout_s=150)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", pages_with("long"))
def test_long_commands_run(page: str, tmp_path: Path) -> None:
    """So does what is marked `long`: setting up, the demo, benches."""
    check(page, "long", tmp_path, timeout_s=1700)


@pytest.mark.docker
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", pages_with("docker"))
def test_docker_commands_run(page: str, tmp_path: Path) -> None:
    """So does what is marked `docker`, where there is an engine."""
    with compose_project() as project:
        check(page, "docker", tmp_path, timeout_s=1700, **project)


def check(page: str, mark: str, folder: Path, *, timeout_s: float, **variables: str) -> None:
    """Run a page's blocks; they succeed and leave no cluster running."""
    model, lessons = write_tiny_llama(folder / "model"), folder / "lessons.jsonl"
    lessons.write_text('{"question": "the cat", "answer": "sat"}\n' * 5, "utf-8")
    ended = run(
        blocks_of(page, mark),
        folder,
        timeout_s=timeout_s,
        MODEL=str(model),
        LESSONS=str(lessons),
        **variables,
    )
    assert ended.status == 0, ended.shown
    assert not ended.clusters_left, "the page leaves a cluster running"
