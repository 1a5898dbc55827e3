"""`lemix up` has an option for each setting, made from the settings."""

from __future__ import annotations

from dataclasses import asdict

import typer

from lemix.cli.app import build
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


def test_up_has_an_option_for_each_setting_and_its_own() -> None:
    """No setting is missing, and each option says what it means."""
    command = typer.main.get_command(build())
    assert isinstance(command, typer.core.TyperGroup)
    parameters = {parameter.name: parameter for parameter in command.commands["up"].params}
    assert set(parameters) == set(asdict(ClusterSettings())) | set(OWN)
    assert {name: parameters[name].envvar for name in OWN} == OWN
    assert all(getattr(parameter, "help", None) for parameter in parameters.values())
