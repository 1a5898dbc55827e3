"""Every command that a page shows is run by a test: its fence says by which."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fences import (
    COMMANDS,
    EXEMPT,
    MARKS,
    OF_A_CLUSTER,
    Fence,
    clusters_in,
    fences,
    fences_of,
    script,
    sessions,
)

PAGE = """\
Say:

```bash test
make help
```

and see:

```text
help
```
"""


def test_every_command_is_marked() -> None:
    """An unmarked command fails the build, so no page can show one that nobody tried."""
    wrong = [f"{fence.where}: {problem}" for fence in fences_of() if (problem := problem_of(fence))]
    assert not wrong, "\n".join(wrong)


def test_the_rule_finds_what_it_forbids() -> None:
    """Commands without a mark, with two, or with an unknown one, and fences without a language."""

    def problems(first: str, text: str = "make lint\n") -> str:
        (fence,) = fences(f"```{first}\n{text}```\n", "page")
        return problem_of(fence)

    assert "no mark" in problems("bash")
    assert "no mark" in problems("python")
    assert "no mark" in problems("bash test long")
    assert "unknown" in problems("bash test quick")
    assert "no language" in problems("")
    assert "isn't run" in problems("text test")
    assert not problems("bash", "make test\n")
    assert not problems("bash long")
    assert not problems("bash test cluster")
    assert not problems("text")


def test_fences_are_found_where_they_are() -> None:
    """Language, marks, text and line are read as the page has them."""
    assert list(fences(PAGE, "page")) == [
        Fence("page", 3, "bash", ("test",), "make help\n"),
        Fence("page", 9, "text", (), "help\n"),
    ]


def test_a_page_is_one_script() -> None:
    """Blocks run in their order in one shell; Python ones are given to Python."""
    blocks = [Fence("p", 1, "bash", ("test",), "A=1\n"), Fence("p", 5, "python", ("test",), "print()\n")]
    lines = script(blocks).splitlines()
    assert lines[0] == "set -euo pipefail"
    assert lines.index("A=1") < lines.index("python - <<'PYTHON'") < lines.index("PYTHON")


def test_what_a_console_shows_is_compared() -> None:
    """A block of commands and their output fails when the output is another."""
    right = "$ echo a\na\n$ echo b\nb\n"
    assert sessions(right) == [("echo a", "a"), ("echo b", "b")]
    assert status_of(right) == 0
    assert status_of("$ echo a\nb\n") != 0
    assert status_of("$ echo a\na\n$ echo c\nb\n") != 0


def test_a_cluster_that_a_page_leaves_is_found(tmp_path: Path) -> None:
    """In the default data directory or in one beside it, as the tutorial has; one that was stopped is none."""
    for name, is_running in ((".lemix", False), (".lemix-mine", True)):
        (tmp_path / name).mkdir()
        if is_running:
            (tmp_path / name / "cluster.json").touch()
    assert clusters_in(tmp_path) == [tmp_path / ".lemix-mine"]


def status_of(console: str) -> int:
    """With which a console block ends."""
    command = ["bash", "-c", script([Fence("p", 1, "console", ("test",), console)])]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode


def problem_of(fence: Fence) -> str:
    """What is wrong with a fence, or nothing."""
    if not fence.language:
        return "no language: `text` if it is no command"
    if fence.language not in COMMANDS:
        return "marked, but a fence of this language isn't run" if fence.marks else ""
    if fence.text.strip() == EXEMPT:
        return ""
    if unknown := set(fence.marks) - MARKS - {OF_A_CLUSTER}:
        return f"unknown mark {', '.join(sorted(unknown))}"
    if len(set(fence.marks) & MARKS) != 1:
        return f"no mark, or more than one, of {', '.join(sorted(MARKS))}"
    return ""
