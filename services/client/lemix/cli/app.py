"""The `lemix` command, put together from what is installed.

Every package adds its commands through the entry-point group ``lemix.commands``: a function that takes the application.
A package whose libraries aren't installed leaves a command behind that says what to install.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version

import typer

from lemix.cli.errors import clear_errors
from lemix_common.errors import BadInput
from lemix_common.logs import configure_logs

_EXTRA_OF = {"lemix_studies": "studies", "lemix_benchmarks": "all"}


def build() -> typer.Typer:
    """The application with every command that can be found."""
    app = typer.Typer(
        name="lemix",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
    )
    app.callback()(_lemix)
    for entry in sorted(entry_points(group="lemix.commands"), key=lambda entry: entry.name):
        try:
            register = entry.load()
        except ImportError as error:
            _add_placeholder(app, entry, error)
        else:
            register(app)
    return app


def main() -> None:
    """Run the command line; stdout is for answers, so what is logged goes to stderr."""
    configure_logs("client", level="warning")
    build()()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("lemix"))
        raise typer.Exit


def _lemix(
    _version: bool = typer.Option(False, "--version", is_eager=True, help="Show it.", callback=_show_version),
) -> None:
    """Serve and train one language model at the same time."""


def _add_placeholder(app: typer.Typer, entry: EntryPoint, error: ImportError) -> None:
    extra = _EXTRA_OF.get(entry.module.partition(".")[0], "all")

    @clear_errors
    def explain(_context: typer.Context) -> None:
        raise BadInput(f"`lemix {entry.name}` can't be used here ({error}): pip install 'lemix[{extra}]'")

    app.command(
        entry.name,
        help=f"Not installed: pip install 'lemix[{extra}]'.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(explain)
