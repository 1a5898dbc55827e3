"""Write the pages that are made from the code; ``--check`` only says whether they are current.

docs/configuration.md is made from the settings. In docs/training.md, what stands below a ``$ lemix train --explain …``
is what that command prints.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import typer
from typer.testing import CliRunner

from lemix.cli.items import register
from lemix.cli.setting_options import setting_descriptions
from lemix_common.settings import ClusterSettings

CONFIGURATION = Path(__file__).with_name("configuration.md")
TRAINING = Path(__file__).with_name("training.md")

EXPLAINED = re.compile(r"(?<=```console\n)\$ lemix (train --explain [^\n]*)\n.*?(?=```)", re.DOTALL)
WIDTH = "120"
"""Of the pictures, in characters."""

INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from lemix_common/settings.py; edit that. -->

A cluster's settings are read once, by `lemix up`, from a TOML file (`--config FILE`), then from the environment, then
from the command line; later ones win. An unknown name or an impossible value is refused before anything starts.
`lemix up --resume` starts from the settings that the cluster had before.

| setting | option | environment | default | meaning |
|---|---|---|---|---|
"""

BESIDES = """
Beside the settings:

| option | environment | default | meaning |
|---|---|---|---|
| `--url` | `LEMIX_URL` | | URL of a broker (Redis 7 or newer, or Valkey); `lemix up` starts one of its own without it |
| `--cluster` | `LEMIX_CLUSTER` | `lemix` | name of the cluster: the prefix of its keys on the broker |
| `--data-dir` | `LEMIX_DATA_DIR` | `.lemix` | where the cluster keeps its state, and clients of this machine find it |
| | `LEMIX_LOG_LEVEL` | `info` | least level that is logged: debug, info, warning, error |
"""


def configuration() -> str:
    """The whole page."""
    return INTRODUCTION + "\n".join(_rows()) + "\n" + BESIDES


def _rows() -> Iterator[str]:
    for field in fields(ClusterSettings):
        option = f"--{field.name.replace('_', '-')}"
        default = "" if field.default == "" else f"`{field.default}`"
        meaning = setting_descriptions()[field.name].replace("|", "\\|")
        yield f"| `{field.name}` | `{option}` | `LEMIX_{field.name.upper()}` | {default} | {meaning} |"


def training() -> str:
    """The page as it is, with the output of its commands as it is now."""
    return EXPLAINED.sub(_with_output, TRAINING.read_text("utf-8"))


def _with_output(command: re.Match[str]) -> str:
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, shlex.split(command[1]), env={"COLUMNS": WIDTH}, catch_exceptions=False)
    return f"$ lemix {command[1]}\n{ran.output}"


PAGES = {CONFIGURATION: configuration, TRAINING: training}


def main() -> None:
    """Write the pages, or compare them."""
    for path, page in PAGES.items():
        if sys.argv[1:] != ["--check"]:
            path.write_text(page(), "utf-8")
        elif not path.exists() or path.read_text("utf-8") != page():
            sys.exit(f"{path.name} is not current: run `make docs`")


if __name__ == "__main__":
    main()
