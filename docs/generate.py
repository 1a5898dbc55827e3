"""Write docs/configuration.md from the settings themselves; ``--check`` only says whether it is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from lemix.cli.setting_options import setting_descriptions
from lemix_common.settings import ClusterSettings

PAGE = Path(__file__).with_name("configuration.md")

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


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "\n".join(_rows()) + "\n" + BESIDES


def _rows() -> Iterator[str]:
    for field in fields(ClusterSettings):
        option = f"--{field.name.replace('_', '-')}"
        default = "" if field.default == "" else f"`{field.default}`"
        meaning = setting_descriptions()[field.name].replace("|", "\\|")
        yield f"| `{field.name}` | `{option}` | `LEMIX_{field.name.upper()}` | {default} | {meaning} |"


def main() -> None:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text("utf-8") != page():
            sys.exit(f"{PAGE.name} is not current: run `make docs`")
    else:
        PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
