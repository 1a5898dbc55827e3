"""What work costs on each stage: the values live in `lemix_common.costs`, since workers read them too."""

from __future__ import annotations

from lemix_common.costs import Cost, Profile, StageCosts

__all__ = ["Cost", "Profile", "StageCosts"]
