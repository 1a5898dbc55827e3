"""The `lemix profile` command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lemix.cli.errors import clear_errors
from lemix.cli.options import ClusterOption, DataDirOption, JsonOption, UrlOption, environment_of
from lemix.discovery import DEFAULT_DATA_DIR, find_cluster
from lemix.model_folder import find_folder, open_model_folder
from lemix_common.broker import Broker, connect
from lemix_common.costs import Cost
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs
from lemix_common.profile_file import profile_object, write_profile
from lemix_common.store.cluster import Cluster
from lemix_coordinator.scheduling.measured import LINES, MeasuredProfile, measured_profile
from lemix_studies.profiling import Measurement, measure, progress_of

PROFILES = "profiles"
"""A folder of the data directory."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(clear_errors(profile))


def profile(
    *,
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the model (default: the cluster's model).")
    ] = "",
    stages: Annotated[
        int | None, typer.Option(min=1, help="Stages that it is cut into (default: the cluster's; else 1).")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:N or auto.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float64 (default: the cluster's, or the model's).")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter passes, in three rounds.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (default: MODEL-STAGES-DEVICE.json in DATA-DIR/profiles)."),
    ] = None,
    data_dir: DataDirOption = Path(DEFAULT_DATA_DIR),
    url: UrlOption = "",
    cluster: ClusterOption = "",
    as_json: JsonOption = False,
) -> None:
    """Measure what work costs on each stage of a model, for the scheduler to predict by.

    With --url or LEMIX_URL, or without --model, a cluster's model is measured, and the profile is stored there too.
    """
    configure_logs("profile", level="warning")
    with _cluster(model, url, cluster, data_dir) as broker:
        wanted = _measurement(broker, model, stages=stages, device=device, dtype=dtype, is_quick=quick)
        measured = measured_profile(wanted.model.name, _measure(wanted))
        path = out or data_dir / PROFILES / wanted.file_name
        write_profile(path, measured.profile)
        if broker is not None:
            Cluster(broker).publish_profile(measured.profile)
    if as_json:
        typer.echo(json.dumps({"file": str(path), "profile": profile_object(measured.profile)}))
        return
    Console().print(*profile_tables(measured), sep="\n")
    typer.echo(f"{path}" if broker is None else f"{path}, and in cluster {broker.keys.cluster}")


def profile_tables(measured: MeasuredProfile) -> list[Table]:
    """What was found, for a reader."""
    found = measured.profile
    lines = Table(
        *("stage", "of", "any pass", "1,000 tokens", "1M contexts", "held out"),
        title=f"{found.model}: {found.num_stages} stages on {found.device}",
        title_justify="left",
    )
    for stage, (costs, fits) in enumerate(zip(found.stages, measured.fits, strict=True)):
        for line in LINES:
            fit = fits[line]
            lines.add_row(
                str(stage), line.replace("_", " "), *_seconds(fit.cost), _percent(fit.held_out_error)
            )
        lines.add_row(str(stage), "optimizer", f"{1e3 * costs.optimizer_s:.2f} ms", "", "", "")
    lines.add_row("", "hop", *_seconds(found.hop), _percent(found.held_out_error.get("hop")))
    sizes = Table("stage", "weights", "training", "activations of a token", "its keys and values")
    for stage, costs in enumerate(found.stages):
        of_all = [f"{size / 2**20:,.1f} MiB" for size in (costs.weight_bytes, costs.training_bytes)]
        of_token = [
            f"{size / 2**10:,.1f} KiB" for size in (costs.activation_bytes.token, costs.kv_token_bytes)
        ]
        sizes.add_row(str(stage), *of_all, *of_token)
    return [lines, sizes]


@contextmanager
def _cluster(model: str, url: str, cluster: str, data_dir: Path) -> Iterator[Broker | None]:
    """The broker of the cluster that is meant; None where only a model is."""
    if model and not url:
        yield None
        return
    address = find_cluster(url, cluster, environment_of(data_dir))
    broker = connect(address.url, address.cluster)
    with closing(broker.client):
        Cluster(broker).settings()  # or there is no cluster on it
        yield broker


def _measurement(
    broker: Broker | None, model: str, *, stages: int | None, device: str, dtype: str, is_quick: bool
) -> Measurement:
    """What is asked for; of a cluster, its own model and cut and no others."""
    if broker is None:
        folder = open_model_folder(model, stages=stages or 1).path
        return Measurement(model=folder, stages=stages or 1, device=device, dtype=dtype, is_quick=is_quick)
    settings, path = Cluster(broker).settings(), Path(broker.hash(broker.keys.model)["path"])
    for name, given, own in (
        ("model", find_folder(model) if model else path, path),
        ("stages", stages or settings.stages, settings.stages),
        ("dtype", dtype or settings.dtype, settings.dtype),
    ):
        if given != own:
            raise BadInput(
                f"--{name} {given}: the cluster has {own}; leave it out, or leave out the cluster's --url"
            )
    folder = open_model_folder(str(path), stages=settings.stages).path
    return Measurement(
        model=folder, stages=settings.stages, device=device, dtype=settings.dtype, is_quick=is_quick
    )


def _measure(wanted: Measurement) -> Mapping[str, Any]:
    console = Console(stderr=True)
    with console.status("measuring") as status:
        return measure(wanted, on_progress=lambda line: status.update(f"measuring, {progress_of(line)}"))


def _seconds(cost: Cost) -> tuple[str, str, str]:
    return f"{1e3 * cost.base:.2f} ms", f"{1e6 * cost.token:.2f} ms", f"{1e9 * cost.context:.2f} ms"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.1f} %"
