"""The fenced blocks of our pages, and how their commands are run as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = frozenset({"bash", "sh", "shell", "console", "zsh", "fish", "python", "py"})
"""Languages of blocks that a reader runs; what they show stands in a ``text`` block."""
MARKS = frozenset({"test", "docker", "long"})
OF_A_CLUSTER = "cluster"
"""Beside a mark: the block is about a cluster that runs (see test_redis_page)."""
EXEMPT = "make test"
"""It would run itself."""
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"

    @property
    def is_command(self) -> bool:
        """A reader runs it."""
        return self.language in COMMANDS


def fences(text: str, page: str) -> Iterator[Fence]:
    """Every block of a page, in order."""
    for found in _FENCE.finditer(text):
        language, *marks = found[1].split() or [""]
        yield Fence(page, text[: found.start()].count("\n") + 1, language, tuple(marks), found[2])


def fences_of(pages: Sequence[Path] = PAGES) -> list[Fence]:
    """Every block of these pages."""
    return [fence for page in pages for fence in fences(page.read_text("utf-8"), _name(page))]


def script(blocks: Sequence[Fence]) -> str:
    """One shell script of a page's blocks, so that what one sets up the next can use; it says where it is."""
    lines = ["set -euo pipefail"]
    for block in blocks:
        lines.append(f"echo '== {block.where}' >&2")
        match block.language:
            case "python" | "py":
                lines.append(f"python - <<'PYTHON'\n{block.text}PYTHON")
            case "console":
                lines += [_session(command, output) for command, output in sessions(block.text)]
            case _:
                lines.append(block.text)
    return "\n".join(lines)


def sessions(text: str) -> list[tuple[str, str]]:
    """The commands of a ``console`` block, which stand behind ``$``, and what each shows."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    return [(command, output.rstrip()) for command, _, output in (part.partition("\n") for part in parts[1:])]


def _session(command: str, output: str) -> str:
    """Shell: the command must show that."""
    wanted = f"<(cat <<'SHOWN'\n{output}\nSHOWN\n)"
    return f"diff --ignore-blank-lines {wanted} <({command}) >&2"


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a page's blocks."""

    status: int
    shown: str
    """The end of what they printed."""
    clusters_left: list[str]
    """Data directories of clusters that still ran; they are stopped now."""


def run(blocks: Sequence[Fence], folder: Path, *, timeout_s: float, **variables: str) -> Ended:
    """Run a page's blocks in a copy of the tree, with an empty home and our programs on PATH."""
    tree, home = folder / "tree", folder / "home"
    home.mkdir()
    copy_tree(tree)
    known = {name: value for name, value in os.environ.items() if not name.startswith("LEMIX_")}
    environment = known | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    try:
        ended = subprocess.run(
            ["bash", "-c", script(blocks)],
            cwd=tree,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        left = [data_dir.name for data_dir in clusters_in(tree)]
        return Ended(ended.returncode, f"{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}", left)
    finally:
        for data_dir in tree.glob(".lemix*"):  # a cluster that still starts is stopped too
            command = [sys.executable, "-m", "lemix", "down", "--data-dir", str(data_dir)]
            subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=120, check=False)


def clusters_in(tree: Path) -> list[Path]:
    """Data directories of the clusters that a page has started and not stopped."""
    return sorted(found.parent for found in tree.glob(".lemix*/cluster.json"))


def copy_tree(target: Path) -> None:
    """What a clone would have, with the changes that aren't committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
