"""A profile of an accelerator that nobody has: stages of some milliseconds."""

from __future__ import annotations

from pathlib import Path

from lemix_common.costs import Cost, Profile, StageCosts
from lemix_common.profile_file import write_profile

STAGE = StageCosts(
    forward=Cost(0.01, 1e-4, 1e-7),
    backward=Cost(0.02, 2e-4, 2e-7),
    decode=Cost(0.01, 1e-4, 1e-6),
    optimizer_s=0.002,
    activation_bytes=Cost(0.0, 1000.0),
    kv_token_bytes=100.0,
    weight_bytes=10**9,
    training_bytes=3 * 10**9,
)


def toy_profile(stages: int) -> Profile:
    """Equal stages."""
    return Profile(
        model="toy",
        device="toy",
        source="roofline",
        stages=(STAGE,) * stages,
        hop=Cost(1e-4, 1e-7),
        memory_bytes=80 * 10**9,
        load_s=1.0,
    )


def write_toy_profile(path: Path, *, stages: int) -> str:
    """As a device of the settings."""
    write_profile(path, toy_profile(stages))
    return f"emulated:{path}"
