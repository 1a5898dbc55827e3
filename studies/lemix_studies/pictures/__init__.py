"""Pictures of a report, drawn with matplotlib (in the extra ``studies``), which is imported only in here."""

from __future__ import annotations

from importlib.util import find_spec

from lemix_common.errors import BadInput


def require_matplotlib() -> None:
    """`BadInput` that says what to install, if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise BadInput("pictures need matplotlib: pip install 'lemix[studies]'")
