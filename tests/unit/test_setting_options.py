"""`lemix up` has an option for each setting, made from the settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import typer

from lemix.cli.app import build
from lemix.data_dir import DataDir
from lemix.running import up_arguments
from lemix.supervisor import Launch
from lemix_common.settings import ClusterSettings

OWN = {
    "config": None,
    "data_dir": "LEMIX_DATA_DIR",
    "cluster": "LEMIX_CLUSTER",
    "url": "LEMIX_URL",
    "port": None,
    "detach": None,
    "resume": None,
}


def up_command() -> typer.core.TyperCommand:
    command = typer.main.get_command(build())
    assert isinstance(command, typer.core.TyperGroup)
    up = command.commands["up"]
    assert isinstance(up, typer.core.TyperCommand)
    return up


def test_up_has_an_option_for_each_setting_and_its_own() -> None:
    """No setting is missing, and each option says what it means."""
    parameters = {parameter.name: parameter for parameter in up_command().params}
    assert set(parameters) == set(asdict(ClusterSettings())) | set(OWN)
    assert {name: parameters[name].envvar for name in OWN} == OWN
    assert all(getattr(parameter, "help", None) for parameter in parameters.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_cluster_started_by_a_program_has_the_programs_settings(recompute: bool) -> None:
    """Each setting is said on the command line, switches too: the environment can't change what was asked for."""
    settings = ClusterSettings(model="m", stages=3, learning_rate=0.25, recompute=recompute)
    launch = Launch(
        settings=settings, directory=DataDir(Path("d")), cluster="c", url="redis://h", resume=True
    )
    understood = up_command().make_context("up", up_arguments(launch)).params
    assert {name: understood[name] for name in asdict(settings)} == asdict(settings)
    assert (understood["cluster"], understood["url"], understood["resume"]) == ("c", "redis://h", True)
