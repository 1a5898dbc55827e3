"""Commands about weight versions: list them, keep one, go back to one."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lemix.cli.errors import clear_errors
from lemix.cli.options import ClusterOption, DataDirOption, JsonOption, UrlOption, environment_of
from lemix.cli.status_table import versions_table
from lemix.client import Client
from lemix.discovery import DEFAULT_DATA_DIR, find_cluster
from lemix_common.broker import connect
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.versions import ENDED_STATES, Versions

_CHECKPOINT_TIMEOUT_S = 300.0


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (versions, checkpoint, rollback):
        app.command()(clear_errors(command))


def versions(
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    count: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the weight versions that were published, and those that `lemix rollback` can go back to."""
    address = find_cluster(url, cluster, environment_of(data_dir))
    with Client(address.url, cluster=address.cluster) as client:
        listed = client.versions(count)
    if as_json:
        typer.echo(json.dumps({"versions": listed}))
    else:
        Console().print(versions_table(listed))


def checkpoint(
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    as_json: JsonOption = False,
) -> None:
    """Write a durable checkpoint of the committed steps now."""
    address = find_cluster(url, cluster, environment_of(data_dir))
    versions = Versions(connect(address.url, address.cluster))
    operation = f"checkpoint-{uuid.uuid4().hex}"
    root = (address.data_dir or data_dir).absolute() / "checkpoints"
    versions.open(operation, "checkpoint", run=MAIN_RUN, optimizer=True, root=str(root))
    wait_until(
        lambda: versions.operation(operation).get("state") in ENDED_STATES,
        what="the checkpoint is sealed",
        timeout_s=_CHECKPOINT_TIMEOUT_S,
    )
    fields = versions.operation(operation)
    if fields["state"] == "failed":
        raise ClusterError(f"the checkpoint failed: {fields.get('reason', 'no reason was recorded')}")
    names = ("version", "step", "directory", "sha256")
    typer.echo(
        json.dumps({name: fields[name] for name in names})
        if as_json
        else f"checkpoint of version {fields['version']} in {fields['directory']}"
    )


def rollback(
    version: Annotated[
        str,
        typer.Argument(metavar="VERSION", help="With a checkpoint (`lemix versions`), or 0.0: the model."),
    ],
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for it.")] = 300.0,
    as_json: JsonOption = False,
) -> None:
    """Serve and train the weights of an earlier version again, as a new one."""
    address = find_cluster(url, cluster, environment_of(data_dir))
    began = time.monotonic()
    with Client(address.url, cluster=address.cluster) as client:
        served = client.rollback(version, timeout)
    seconds = round(time.monotonic() - began, 3)
    typer.echo(
        json.dumps({"version": served, "parent": version, "seconds": seconds})
        if as_json
        else f"version {served} serves the weights of {version}, after {seconds:.1f} s; training goes on from there"
    )
