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
