"""A point of a study: a setting, which is everything that policies share, and a variant, which is the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Task = Literal["score", "generate"]
Arrivals = Literal["poisson", "all", "alternating", "trace"]
LengthOrder = Literal["random", "ascending", "descending", "bursty"]
Selection = Literal["", "random", "first", "last", "length", "adaptive"]

OURS = "lemix"
PREFERENCES = ("balanced", "nodes", "speed")
POLICIES = (
    *("separate", "separate-dynamic", "naive-mix", "random", "luf", "jsq"),
    *("naive-mix+", "random+", "luf+", "lemix-prototype", "lemix-paper", OURS),
)
ON_AS_MANY_NODES = tuple(name for name in POLICIES if name.endswith("+"))
"""They run on the nodes that `lemix` used at the same point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked of which cluster; all policies get the same."""

    study: str
    model: str
    device: str = "a100-80g"
    nodes: int
    stages: int
    task: Task = "score"
    arrivals: Arrivals = "poisson"
    rate: float
    """Requests a second; of `alternating` and `trace` the mean."""
    training_rate: float
    """The part of the items that is trained."""
    release: Literal["s-pp", "a-pp"] = "s-pp"
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    microbatches: int = 2
    stage_order: Literal["fifo", "urgency"] = "fifo"
    items: int
    rows: int = 1
    """Of an item: the paper's batch size. Requests of `generate` have one."""
    decode_batch: int = 16
    length_order: LengthOrder = "random"
    sigma: float | None = None
    """Standard deviation of the lengths that are taken; None: of all."""
    selection: Selection = ""
    """Which examples are trained at all; the others are left out."""
    selection_ratio: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:  # written as they are read again: 4 and 4.0 are one rate
        for name in ("rate", "training_rate", "selection_ratio"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.sigma is not None:
            object.__setattr__(self, "sigma", float(self.sigma))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Who decides."""

    policy: str
    prefer: str = ""
    """Of `lemix`."""
    use_nodes: int | None = None
    """Of policies that are kept to so many nodes; None for those with a plus: as many as `lemix` used."""
    split: float | None = None
    """`separate` divides the nodes by this instead of the training rate."""
    uses_profile: bool = True
    prioritises: bool = True
    checks_memory: bool = True
    alpha: float | None = None
    beta: float | None = None
    epsilon: float | None = None

    @property
    def label(self) -> str:
        """As tables and pictures call it."""
        parts = [f"{self.policy} · {self.prefer}" if self.prefer else self.policy]
        if self.use_nodes is not None:
            parts.append(f"on {self.use_nodes} node{'s' * (self.use_nodes > 1)}")
        if self.split is not None:
            parts.append(f"split {self.split:g}")
        parts += [
            words
            for is_on, words in (
                (self.uses_profile, "no profile"),
                (self.prioritises, "no prioritisation"),
                (self.checks_memory, "no memory check"),
            )
            if not is_on
        ]
        for name in ("alpha", "beta", "epsilon"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {value:g}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Point:
    """One run."""

    setting: Setting
    variant: Variant

    @property
    def key(self) -> str:
        """Names the point: equal for equal points only, whatever run they are in."""
        return key_of(self.values)

    @property
    def values(self) -> dict[str, object]:
        """Its fields, by their names."""
        return asdict(self.setting) | asdict(self.variant)


FIELDS = tuple(field.name for kind in (Setting, Variant) for field in fields(kind))


def key_of(row: Mapping[str, Any]) -> str:
    """The key of the point that a row, which may have more fields, tells of."""
    return ";".join(f"{name}={'' if row[name] is None else row[name]}" for name in FIELDS)


def setting_of(row: Mapping[str, Any]) -> Setting:
    """The setting of such a row."""
    return Setting(**{field.name: row[field.name] for field in fields(Setting)})


def variant_of(row: Mapping[str, Any]) -> Variant:
    """The variant of such a row."""
    return Variant(**{field.name: row[field.name] for field in fields(Variant)})
