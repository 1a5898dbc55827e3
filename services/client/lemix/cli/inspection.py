"""Commands that only look: live, at one item, at the machine."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from lemix.cli.errors import EXIT_FAILED, clear_errors
from lemix.cli.keyboard import keys
from lemix.cli.options import ClusterOption, DataDirOption, JsonOption, UrlOption, environment_of
from lemix.cli.status_table import item_table
from lemix.discovery import DEFAULT_CLUSTER, DEFAULT_DATA_DIR, find_cluster
from lemix.doctor import Questions, examine
from lemix.status import read_status
from lemix.top import Sight, frame
from lemix_common.broker import Broker, connect
from lemix_common.errors import BrokerError
from lemix_common.store.items import Items

_WINDOW = 10
"""Frames over which rates are taken."""


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (top, item, doctor, url_command):
        app.command(command.__name__.removesuffix("_command"))(clear_errors(command))


def top(
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Watch nodes, stages, queues and the training tax; q or Ctrl-C ends."""
    broker = _connect(url, cluster, data_dir)
    now = broker.clock.now
    seen: deque[Sight] = deque([Sight(now(), read_status(broker))], maxlen=_WINDOW)
    if once:
        console = Console()
        console.print(frame(seen[-1], width=console.width))
        return
    try:
        with keys() as wait, Live(screen=True, auto_refresh=False) as live:
            live.update(frame(seen[-1], width=live.console.width), refresh=True)
            while wait(interval) not in {"q", "Q"}:
                trouble = ""
                try:
                    seen.append(Sight(now(), read_status(broker)))
                except BrokerError as error:
                    trouble = f"this is old: {error}"
                earlier = seen[0] if len(seen) > 1 else None
                picture = frame(seen[-1], earlier, width=live.console.width, trouble=trouble)
                live.update(picture, refresh=True)
    except KeyboardInterrupt:
        pass


def item(
    item_id: Annotated[
        str, typer.Argument(metavar="ID", help="As submit, generate --json or a log says it.")
    ],
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    as_json: JsonOption = False,
) -> None:
    """Show everything the cluster knows of one item."""
    fields = Items(_connect(url, cluster, data_dir)).get(item_id)
    if as_json:
        typer.echo(json.dumps({"item": item_id} | fields))
    else:
        Console().print(item_table(item_id, fields))


def doctor(
    *,
    model: Annotated[str, typer.Option(help="A model you want to serve, to be checked too.")] = "",
    stages: Annotated[int, typer.Option(min=1, help="Into how many stages it would be cut.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes you want on this machine.")] = 1,
    url: UrlOption = "",
    cluster: Annotated[
        str, typer.Option(envvar="LEMIX_CLUSTER", help="Name of the cluster.")
    ] = DEFAULT_CLUSTER,
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    port: Annotated[int, typer.Option(min=0, max=65535, help="A port you want for the broker.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check that a cluster can run here; one line a check, and what to do where one fails."""
    findings = examine(
        Questions(
            data_dir=data_dir.absolute(),
            url=url,
            cluster=cluster,
            port=port,
            model=model,
            stages=stages,
            workers=workers,
        ),
        os.environ,
    )
    if as_json:
        typer.echo(json.dumps([finding.to_fields() for finding in findings]))
    else:
        for finding in findings:
            typer.echo(finding)
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def url_command(
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
) -> None:
    """Print the broker's URL, password included: redis-cli -u "$(lemix url)"."""
    found = find_cluster(url, cluster, environment_of(data_dir)).url
    typer.echo(found.replace("://:", "://default:", 1))  # redis-cli sends an empty user's name as it is


def _connect(url: str, cluster: str, data_dir: Path) -> Broker:
    address = find_cluster(url, cluster, environment_of(data_dir))
    return connect(address.url, address.cluster, patience_s=0)
