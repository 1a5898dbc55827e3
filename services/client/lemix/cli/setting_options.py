"""The cluster's settings as command-line options, made from `ClusterSettings` itself so that the two can't drift."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from lemix_common.settings import ClusterSettings


@functools.cache
def setting_descriptions() -> Mapping[str, str]:
    """What each setting means: the text below its field."""
    (definition,) = ast.parse(inspect.getsource(ClusterSettings)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(described))):
                texts[name] = described
    return texts


def with_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting; those the user gave arrive in its ``settings`` argument."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    names = [field.name for field in fields(ClusterSettings)]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        command(settings={name: options.pop(name) for name in names}, **options)

    run.__signature__ = inspect.Signature([*_setting_parameters(), *own])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*_setting_parameters(), *own]} | {"return": None}
    return run


def _setting_parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                type(field.default) | None,
                typer.Option(
                    _option(field.name, field.default),
                    help=f"{setting_descriptions()[field.name]} [default: {_shown(field.default)}]",
                    show_default=False,
                ),
            ],
        )
        for field in fields(ClusterSettings)
    ]


def _option(name: str, default: object) -> str:
    name = name.replace("_", "-")
    return f"--{name}/--no-{name}" if isinstance(default, bool) else f"--{name}"


def _shown(value: object) -> str:
    return "none" if value == "" else str(value)
