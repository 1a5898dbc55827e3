from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from lemix_studies.pictures.colours import FILLS, OUTLINES

Floats = NDArray[np.float64]
SEEN_WITH: dict[str, Floats] = {  # Machado, Oliveira, Fernandes 2009, at full severity, on linear RGB
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
CLEAR = 25.0
"""A difference (CIE 1976) of about 2 can just be noticed."""


def lab(colour: str, cones: Floats) -> Floats:
    """A colour as it is perceived."""
    encoded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(cones @ linear, 0, 1) / WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", SEEN_WITH)
@pytest.mark.parametrize("colours", [FILLS, OUTLINES], ids=["fills", "outlines"])
def test_colours_keep_apart_for_everyone(colours: dict[str, str], eyes: str) -> None:
    """Any two that are used in the same way differ clearly, also for colour-blind eyes."""
    for one, other in combinations(sorted(set(colours.values())), 2):
        difference = float(np.linalg.norm(lab(one, SEEN_WITH[eyes]) - lab(other, SEEN_WITH[eyes])))
        assert difference > CLEAR, f"{one} and {other} differ by {difference:.0f}"
