"""How all pictures look, and how they become files.

The colours keep apart for colour-blind eyes (a test measures it): what serves is amber, what trains is blue, teal and
charcoal; the two kinds of idleness are outlines, orchid and red.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Format = Literal["png", "svg"]

AMBER = "#F0B429"
BLUE = "#2B5C9E"
TEAL = "#8CCFC0"
CHARCOAL = "#333333"
ORCHID = "#B565C9"
RED = "#C1272D"
INK = "#222222"
GREY = "#8A8A8A"

FILLS: Mapping[str, str] = {
    "prefill": AMBER,
    "decode": AMBER,
    "training_forward": BLUE,
    "training_backward": TEAL,
    "optimizer": CHARCOAL,
}
OUTLINES: Mapping[str, str] = {"idle_serving": ORCHID, "idle_pipeline": RED}

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
