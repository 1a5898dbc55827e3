"""The options by which commands find a cluster, and how they answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

DataDirOption = Annotated[
    Path, typer.Option(envvar="LEMIX_DATA_DIR", help="Where the cluster keeps its state.", show_default=True)
]
UrlOption = Annotated[str, typer.Option(envvar="LEMIX_URL", help="URL of the cluster's broker.")]
ClusterOption = Annotated[
    str, typer.Option(envvar="LEMIX_CLUSTER", help="Name of the cluster on its broker.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def environment_of(data_dir: Path) -> Mapping[str, str]:
    """This process's environment, with the data directory that was chosen."""
    return os.environ | {"LEMIX_DATA_DIR": str(data_dir)}
