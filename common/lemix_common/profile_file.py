"""A profile as a file that people read, compare and edit: one JSON object, its schema numbered.

What is read may have been written by hand. So it is checked here, once: a field too many or too few, a figure that is
none, or another schema is one `BadInput` that names the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

from lemix_common.costs import Cost, Profile, RowSteps, StageCosts
from lemix_common.errors import BadInput

SCHEMA: Final = 2
_READ: Final = (1, SCHEMA)
"""Schemas that can be read: the first had no `row_steps`."""
_SOURCES: Final = ("measured", "roofline")
_LINE: Final = ("base", "token", "context")
_STAGE_LINES: Final = ("forward", "backward", "decode", "activation_bytes")
_STAGE_NUMBERS: Final = ("optimizer_s", "kv_token_bytes")
_STAGE_BYTES: Final = ("weight_bytes", "training_bytes")
_STAGE: Final = (*_STAGE_LINES, "training_forward", *_STAGE_NUMBERS, *_STAGE_BYTES)
_PROFILE: Final = ("model", "device", "source", "stages", "hop", "memory_bytes", "load_s", "held_out_error")


def read_profile(path: Path) -> Profile:
    """The profile in a file; `BadInput` if it isn't one."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the profile {path} can't be read ({error}): `lemix profile` writes one") from None
    return parse_profile(text, where=str(path))


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile in place of what is there, whole or not at all; `BadInput` if that can't be written."""
    fresh = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(profile_object(profile), indent=1) + "\n", "utf-8")
        fresh.replace(path)
    except OSError as error:
        raise BadInput(
            f"the profile {path} can't be written ({error.strerror}): choose another file"
        ) from None


def profile_object(profile: Profile) -> dict[str, Any]:
    """The profile as JSON has it."""
    return {"schema": SCHEMA, **asdict(profile), "held_out_error": dict(profile.held_out_error)}


def parse_profile(text: str, *, where: str) -> Profile:
    """The profile that a JSON text is; ``where`` it was found begins what is said against it."""
    try:
        return profile_from(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not a profile: {error}") from None


def profile_from(found: object) -> Profile:
    """The profile that a JSON object is. `ValueError`: it isn't one."""
    schema = found.get("schema") if isinstance(found, Mapping) else None
    if schema not in _READ or isinstance(schema, bool):
        raise ValueError(
            f"its schema is {schema!r:.40}, and {_READ[0]} to {SCHEMA} can be read; run `lemix profile` again"
        )
    fields = _object(found, "it", ("schema", *_PROFILE))
    for name in ("model", "device"):
        if not isinstance(fields[name], str):
            raise ValueError(f"{name} is {fields[name]!r:.40}, not a name")  # noqa: TRY004 - a wrong text
    if fields["source"] not in _SOURCES:
        raise ValueError(f"source is {fields['source']!r:.40}, not {' or '.join(_SOURCES)}")
    stages = fields["stages"]
    if not isinstance(stages, Sequence) or not stages:
        raise ValueError("stages is not a list of stages")
    errors = fields["held_out_error"]
    if not isinstance(errors, Mapping):
        raise ValueError("held_out_error is not an object")  # noqa: TRY004 - a wrong text
    return Profile(
        model=fields["model"],
        device=fields["device"],
        source=fields["source"],
        stages=tuple(_stage(stage, f"stages[{index}]", schema) for index, stage in enumerate(stages)),
        hop=_cost(fields["hop"], "hop"),
        memory_bytes=_bytes(fields["memory_bytes"], "memory_bytes"),
        load_s=_number(fields["load_s"], "load_s"),
        held_out_error={
            str(kind): _number(error, f"held_out_error.{kind}") for kind, error in errors.items()
        },
    )


def _stage(found: object, where: str, schema: int) -> StageCosts:
    fields = _object(found, where, _STAGE if schema == 1 else (*_STAGE, "row_steps"))
    lines: dict[str, Cost | None] = {name: _cost(fields[name], f"{where}.{name}") for name in _STAGE_LINES}
    if fields["training_forward"] is not None:
        lines["training_forward"] = _cost(fields["training_forward"], f"{where}.training_forward")
    numbers = {name: _number(fields[name], f"{where}.{name}") for name in _STAGE_NUMBERS}
    sizes = {name: _bytes(fields[name], f"{where}.{name}") for name in _STAGE_BYTES}
    steps = _row_steps(fields.get("row_steps", ()), f"{where}.row_steps")
    return StageCosts(**cast("dict[str, Any]", {**lines, **numbers, **sizes, "row_steps": steps}))


def _row_steps(found: object, where: str) -> RowSteps:
    """Pairs of whole numbers from 1 on, the first of them ascending."""
    try:
        pairs = [(most, step) for most, step in cast("Any", found)]
    except (TypeError, ValueError):
        raise ValueError(f"{where} is not a list of pairs") from None
    steps = tuple((_bytes(most, where), _bytes(step, where)) for most, step in pairs)
    mosts = [most for most, _ in steps]
    if mosts != sorted(set(mosts)) or any(min(pair) < 1 for pair in steps):
        raise ValueError(f"{where} is not ascending from 1 on")
    return steps


def _cost(found: object, where: str) -> Cost:
    fields = _object(found, where, _LINE)
    return Cost(**{name: _number(fields[name], f"{where}.{name}") for name in _LINE})


def _object(found: object, where: str, names: Sequence[str]) -> Mapping[str, Any]:
    """An object with exactly these fields."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is not an object")  # noqa: TRY004 - a wrong text, not a wrong argument
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{where} has no {', '.join(missing)}")
    if unknown := [str(name) for name in found if name not in names]:
        raise ValueError(f"{where} has {', '.join(unknown):.80}, which is unknown")
    return found


def _number(found: object, where: str) -> float:
    """Not negative, and finite."""
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not is_number or not math.isfinite(cast("float", found)) or cast("float", found) < 0:
        raise ValueError(f"{where} is {found!r:.40}, not a number from 0 on")
    return float(cast("float", found))


def _bytes(found: object, where: str) -> int:
    number = _number(found, where)
    if number != int(number):
        raise ValueError(f"{where} is {found!r:.40}, not a whole number")
    return int(number)
