"""The colours of all pictures.

They keep apart for colour-blind eyes (a test measures it): what serves is amber, what trains is blue, teal and
charcoal; the two kinds of idleness are outlines, orchid and red.
"""

from __future__ import annotations

from collections.abc import Mapping

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

BLACK = "#000000"
LINES: Mapping[str, str] = {
    "separate": "#D55E00",
    "separate-dynamic": "#A8780A",
    "naive-mix": "#0072B2",
    "random": "#8A8A8A",
    "luf": "#009E73",
    "jsq": "#56B4E9",
    "lemix-prototype": "#B565C9",
    "lemix-paper": "#E8436E",
}
"""Policies other than ours, whose lines are black (after Okabe and Ito); markers and dashes tell them apart too."""
