"""Commands about a cluster: start and stop it, look at it, save what it learned."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from redis.exceptions import RedisError
from rich.console import Console

from lemix.cli import versions
from lemix.cli.errors import EXIT_TARGET_MISSED, clear_errors
from lemix.cli.options import ClusterOption, DataDirOption, JsonOption, UrlOption, environment_of
from lemix.cli.redis_reply import show
from lemix.cli.setting_options import with_setting_options
from lemix.cli.status_table import status_tables
from lemix.client import Client
from lemix.creation import create_cluster
from lemix.data_dir import DataDir, RunningCluster
from lemix.discovery import DEFAULT_CLUSTER, DEFAULT_DATA_DIR, find_cluster
from lemix.export import export_model
from lemix.model_folder import open_model_folder
from lemix.running import start_detached, stop_cluster
from lemix.status import can_serve
from lemix.supervisor import Launch, supervise
from lemix_common.broker import Broker, connect, hide_password
from lemix_common.errors import BadInput, BrokerError
from lemix_common.logs import configure_logs
from lemix_common.settings import load_settings
from lemix_common.store.joining import await_broker


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command()(with_setting_options(clear_errors(up)))
    app.command()(with_setting_options(clear_errors(create)))
    app.command()(clear_errors(down))
    app.command()(clear_errors(status))
    versions.register(app)
    app.command()(clear_errors(export))
    app.command(
        "redis",
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )(clear_errors(redis_command))


def up(
    *,
    settings: Mapping[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    cluster: ClusterOption = DEFAULT_CLUSTER,
    url: Annotated[
        str, typer.Option(envvar="LEMIX_URL", help="A broker that runs already, instead of one of our own.")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of our own broker; 0: any free one.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the cluster is ready.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what --data-dir holds.")] = False,
) -> None:
    """Start a cluster on this machine and keep it running until SIGINT."""
    directory = DataDir(data_dir.absolute())
    if resume and config is None and directory.has_state():
        config = directory.settings
    launch = Launch(
        settings=load_settings(config, **settings),
        directory=directory,
        cluster=cluster,
        url=url,
        port=port,
        resume=resume,
    )
    if detach:
        typer.echo(_ready_line(start_detached(launch), cluster, directory.path))
        return
    configure_logs("supervisor", level=os.environ.get("LEMIX_LOG_LEVEL", "info"))
    supervise(launch, _say_ready)


def create(
    *,
    settings: Mapping[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    cluster: ClusterOption = DEFAULT_CLUSTER,
    url: UrlOption = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a broker that isn't there yet.")] = False,
) -> None:
    """Publish a cluster on a broker without starting its processes, or go on with the one that is there.

    For containers and other places where something else starts the processes and keeps them running.
    """
    configure_logs("create", level=os.environ.get("LEMIX_LOG_LEVEL", "info"))
    if not url:
        raise BadInput("give the --url of a running broker, or LEMIX_URL")
    chosen = load_settings(config, **settings)
    model = open_model_folder(chosen.model, stages=chosen.stages)
    broker = await_broker(url, cluster, threading.Event()) if wait else connect(url, cluster)
    assert broker is not None
    create_cluster(broker, url, chosen, model, DataDir(data_dir.absolute()))
    typer.echo(
        f"cluster {cluster}: {chosen.nodes} nodes x {chosen.stages} stages of {model.path} "
        f"at {hide_password(url)} (state in {data_dir.absolute()})"
    )


def down(data_dir: DataDirOption = Path(DEFAULT_DATA_DIR)) -> None:
    """Stop the cluster of this data directory, after a last checkpoint; clear away what a killed one left."""
    typer.echo(stop_cluster(DataDir(data_dir.absolute())))


def status(
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    as_json: JsonOption = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 unless every node can serve.")] = False,
) -> None:
    """Show nodes, workers, queues and the served version."""
    address = find_cluster(url, cluster, environment_of(data_dir))
    with Client(address.url, cluster=address.cluster) as client:
        state = client.status()
    if as_json:
        typer.echo(json.dumps(state))
    else:
        Console().print(*status_tables(state), sep="\n")
    if check and not can_serve(state):
        raise typer.Exit(EXIT_TARGET_MISSED)


def export(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
) -> None:
    """Write the served weights as a Hugging Face model folder."""
    version = export_model(_connect(url, cluster, data_dir), target)
    typer.echo(f"version {version} in {target}")


def redis_command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="ARGS…", help="For instance: XLEN {lemix}:submissions")
    ],
    *,
    url: UrlOption = "",
    cluster: ClusterOption = "",
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
) -> None:
    """Send a raw command to the cluster's broker."""
    pool = _connect(url, cluster, data_dir).client.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_command(*arguments)  # type: ignore[no-untyped-call]
        typer.echo(show(connection.read_response()))
    except RedisError as error:
        raise BrokerError(f"the broker refused this: {error}") from None
    finally:
        pool.release(connection)
        pool.disconnect()


def _connect(url: str, cluster: str, data_dir: Path) -> Broker:
    address = find_cluster(url, cluster, environment_of(data_dir))
    return connect(address.url, address.cluster)


def _say_ready(running: RunningCluster) -> None:
    typer.echo(_ready_line(running.url, running.cluster, Path(running.data_dir)))


def _ready_line(url: str, cluster: str, data_dir: Path) -> str:
    return f"cluster {cluster} is ready at {hide_password(url)} (state in {data_dir}; `lemix down` stops it)"
