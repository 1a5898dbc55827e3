"""Write the pages, and parts of pages, that are made from the code; ``--check`` only says whether they are current.

A whole page is made by a function of nothing. A part stands in a page between ``<!-- NAME: … -->`` and an end mark.
What stands below a ``$ lemix train --explain …`` is what that command prints.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import typer
from typer.testing import CliRunner

from lemix.cli.items import register
from lemix.cli.setting_options import setting_descriptions
from lemix_common import errors, messages
from lemix_common.keys import Keys
from lemix_common.metrics import HOST_VARIABLE, METRICS, PORT_VARIABLE
from lemix_common.settings import ClusterSettings
from lemix_common.store import items, versions

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGES = {
    "lemix_common": "common",
    "lemix": "services/client",
    "lemix_coordinator": "services/coordinator",
    "lemix_stage_worker": "services/stage_worker",
    "lemix_studies": "studies",
    "lemix_benchmarks": "benchmarks",
}

# ------------------------------------------------------------------------------------------------- configuration.md

CONFIGURATION = """\
# Configuration

<!-- Written by `make docs` from lemix_common/settings.py; edit that. -->

A cluster's settings are read once, by `lemix up` or `lemix create`, from a TOML file (`--config FILE`), then from the
environment, then from the command line; later ones win. An unknown name or an impossible value is refused before
anything starts. `lemix up --resume` starts from the settings that the cluster had before.

| setting | option | environment | default | meaning |
|---|---|---|---|---|
"""

BESIDES = f"""
Beside the settings:

| option | environment | default | meaning |
|---|---|---|---|
| `--url` | `LEMIX_URL` | | URL of a broker (Redis 7 or newer, or Valkey); `lemix up` starts one of its own without it |
| `--cluster` | `LEMIX_CLUSTER` | `lemix` | name of the cluster: the prefix of its keys on the broker |
| `--data-dir` | `LEMIX_DATA_DIR` | `.lemix` | where the cluster keeps its state, and clients of this machine find it |
| | `LEMIX_LOG_LEVEL` | `info` | least level that is logged: debug, info, warning, error |
| | `{PORT_VARIABLE}` | any free | first port of the metrics pages (see metrics.md) |
| | `{HOST_VARIABLE}` | `127.0.0.1` | address they listen on |
"""


def configuration() -> str:
    """The settings, an option each."""
    return CONFIGURATION + "\n".join(_setting_rows()) + "\n" + BESIDES


def _setting_rows() -> Iterator[str]:
    for field in fields(ClusterSettings):
        option = f"--{field.name.replace('_', '-')}"
        default = "" if field.default == "" else f"`{field.default}`"
        meaning = _cell(setting_descriptions()[field.name])
        yield f"| `{field.name}` | `{option}` | `LEMIX_{field.name.upper()}` | {default} | {meaning} |"


# ------------------------------------------------------------------------------------------------------ messages.md

MESSAGES = """\
# Messages

<!-- Written by `make docs` from lemix_common/messages.py; edit that. -->

Everything that processes say to each other. Commands are imperative, events past tense. Each vocabulary is closed: a
message that isn't in it, or has other fields or other types, is refused, and the process lives.
"""

FRAMES = """\
Between stage workers, by tensor messaging (`lemix_common/wire.py`): msgpack, followed by raw tensors. Each says for
which node, stage and placement epoch it is meant; what an older placement sent is dropped.
"""

NOTICES = """\
On the cluster's control stream (`lemix_common/fields.py`), in the one order that every process reads. Each is written
by the Lua call that changes the hashes it speaks of, so who missed some reads the hashes.
"""

VOCABULARIES = {
    "Frames": (messages.Frame, FRAMES),
    "Notices": (messages.Notice, NOTICES),
}


def message_reference() -> str:
    """Every message with its fields."""
    comments = _field_comments(Path(inspect.getfile(messages)))
    parts = [MESSAGES]
    for title, (union, about) in VOCABULARIES.items():
        parts += [f"\n## {title}\n\n{about}\n| message | meaning | fields |\n|---|---|---|\n"]
        for kind in get_args(union):
            shown = (_field(f.name, str(f.type), comments.get((kind.__name__, f.name))) for f in fields(kind))
            parts.append(f"| `{kind.__name__}` | {_cell(_doc(kind))} | {', '.join(shown)} |\n")
    return "".join(parts)


def _field(name: str, kind: str, comment: str | None) -> str:
    return f"`{name}`: {kind}" + (f" ({_cell(comment)})" if comment else "")


def _field_comments(source: Path) -> dict[tuple[str, str], str]:
    """What stands behind a field in its line, by class and field."""
    lines = source.read_text("utf-8").splitlines()
    return {
        (kind.name, field.target.id): lines[field.lineno - 1].partition("#")[2].strip()
        for kind in ast.parse("\n".join(lines)).body
        if isinstance(kind, ast.ClassDef)
        for field in kind.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


# ------------------------------------------------------------------------------------------------------- metrics.md

METRICS_PAGE = f"""\
# Metrics

<!-- Written by `make docs` from lemix_common/metrics.py; edit that. -->

Every process shows its metrics to Prometheus at `http://127.0.0.1:PORT/metrics`. The ports are any free ones, unless
`{PORT_VARIABLE}` says which: the coordinator gets that one, operations and the workers the next ones.
`{HOST_VARIABLE}` (in containers, for instance, 0.0.0.0) lets other machines look. `lemix status` lists the pages, and
`lemix up` keeps them in `.lemix/prometheus.json`, which Prometheus reads by itself:

```yaml
scrape_configs:
  - job_name: lemix
    file_sd_configs:
      - files: [/path/to/.lemix/prometheus.json]
        refresh_interval: 5s
```

What concerns the whole cluster is shown by the leading coordinator alone, so sums over all processes count nothing
twice. The live training tax, for instance, is

```promql
rate(lemix_training_blocked_seconds_total[1m])
  / (rate(lemix_response_seconds_total[1m]) - rate(lemix_training_blocked_seconds_total[1m]))
```

and how busy each stage is, by kind of work,

```promql
sum by (node, stage, kind) (rate(lemix_stage_busy_seconds_total[1m]))
```

| metric | kind | labels | shown by | meaning |
|---|---|---|---|---|
"""

METRICS_END = """
Every process also shows `process_*` (memory, CPU time, open files, start time; on Linux) and `python_info`.
"""


def metrics_reference() -> str:
    """Every metric with what it means."""
    rows = (
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} "
        f"| {metric.shown_by} | {_cell(metric.meaning)} |\n"
        for metric in METRICS
    )
    return METRICS_PAGE + "".join(rows) + METRICS_END


# ------------------------------------------------------------------------------------------------- parts of pages


def key_table() -> str:
    """Every key of a cluster, as an operator writes it."""
    keys, rows = Keys("lemix"), ["| key | is | holds |\n|---|---|---|"]
    for name, member in vars(Keys).items():
        if name == "prefix" or name.startswith("_") or not isinstance(member, property | type(key_table)):
            continue
        if isinstance(member, property):
            key, about = getattr(keys, name), _doc(member)
        else:
            capitals = [parameter.upper() for parameter in list(inspect.signature(member).parameters)[1:]]
            key, about = getattr(keys, name)(*capitals), _doc(member)
        kind, _, holds = about.partition(": ") if ": " in about else about.partition(" ")
        rows.append(f"| `{key}` | {kind.lower()} | {_cell(holds)} |")
    return "\n".join(rows)


def module_list() -> str:
    """One line a module: the first sentence of its docstring."""
    return "\n\n".join(
        "\n".join([f"**`{folder}/{package}/`**\n", *_modules(ROOT / folder / package)])
        for package, folder in PACKAGES.items()
    )


def _modules(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if docstring is None or (path.name == "__init__.py" and path.parent == package):
            continue
        name = path.relative_to(package).as_posix().removesuffix("__init__.py")
        yield f"- `{name}` – {_first_sentence(docstring)}"


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0].replace("``", "`")


def drawing(docstring: str | None) -> str:
    """The literal block of a module's docstring: the code's own picture."""
    _, _, behind = inspect.cleandoc(docstring or "").partition("::\n\n")
    lines: list[str] = []
    for line in behind.splitlines():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    picture = inspect.cleandoc("\n" + "\n".join(lines)).rstrip().replace("``", "")
    return f"```text\n{picture}\n```"


# ------------------------------------------------------------------------------------------- commands and their output

EXPLAINED = re.compile(r"(?<=```console\n)\$ lemix (train --explain [^\n]*)\n.*?(?=```)", re.DOTALL)
WIDTH = "120"
"""Of the pictures, in characters."""


def with_pictures(text: str) -> str:
    """A page with what its commands print now."""
    return EXPLAINED.sub(_with_output, text)


def _with_output(command: re.Match[str]) -> str:
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, shlex.split(command[1]), env={"COLUMNS": WIDTH}, catch_exceptions=False)
    return f"$ lemix {command[1]}\n{ran.output}"


# ------------------------------------------------------------------------------------------------------- all of it

WHOLE: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "messages.md": message_reference,
    "metrics.md": metrics_reference,
}
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "redis.md": {"keys": key_table},
    "architecture.md": {
        "items": lambda: drawing(items.__doc__),
        "operations": lambda: drawing(versions.__doc__),
        "errors": lambda: drawing(errors.__doc__),
        "modules": module_list,
    },
}


def pages() -> Iterator[tuple[Path, str]]:
    """Each page and what it must say."""
    for name, make in WHOLE.items():
        yield DOCS / name, make()
    for name, parts in PARTS.items():
        text = (DOCS / name).read_text("utf-8")
        for part, make in parts.items():
            text = replace_part(text, part, make())
        yield DOCS / name, text
    yield DOCS / "training.md", with_pictures((DOCS / "training.md").read_text("utf-8"))


def replace_part(text: str, part: str, content: str) -> str:
    """The page with another content between a part's marks."""
    between = re.compile(rf"(<!-- {part}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
    if len(between.findall(text)) != 1:
        sys.exit(f"a page lacks its one part {part!r}")
    return between.sub(lambda marks: f"{marks[1]}{content}\n{marks[2]}", text)


def _doc(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def main() -> None:
    """Write the pages, or compare them."""
    is_check = sys.argv[1:] == ["--check"]
    for path, text in pages():
        if not is_check:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"{path.name} is not current: run `make docs`")


if __name__ == "__main__":
    main()
