"""Errors as a terminal shows them: one line on stderr, and the exit status that scripts rely on.

==  =======================================
0   it ran
1   it failed
2   bad input: nothing was changed
3   a target was missed (only ``--check``)
==  =======================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from lemix_common.errors import BadInput, LemixError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_TARGET_MISSED = 3

P = ParamSpec("P")
R = TypeVar("R")


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Have a command end a `LemixError` as one line and its exit status; anything else is a bug and shows itself."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except LemixError as error:
            typer.echo(f"lemix: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED) from None

    return run
