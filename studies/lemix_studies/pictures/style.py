"""How all pictures look, and how they become files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lemix_studies.pictures.colours import INK

Format = Literal["png", "svg"]

DPI = 140
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "lemix",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Whatever the user's own matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def light_grid(axes: Axes) -> None:
    """Faint horizontal lines behind what is drawn."""
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def rendered(figure: Figure, form: Format) -> bytes:
    """The file's bytes; equal figures give equal bytes."""
    file = BytesIO()
    figure.savefig(
        file, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else {"Software": None}
    )
    return file.getvalue()
