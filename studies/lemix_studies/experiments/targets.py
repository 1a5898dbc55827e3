"""What `lemix` is to reach on `spp-gpt`, preference by preference, and what it reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lemix_studies.experiments.settings import OURS
from lemix_studies.experiments.tables import (
    BETTER,
    Rows,
    by_place,
    geometric_mean,
    is_baseline,
    ratios,
    value_of,
)

ENOUGH: Final = 0.99
SLACK: Final = 0.005
FEWEST: Final = 1.25
_SLO = "SLO attainment 5×"
_GOODPUT = "goodput per node-second"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line of what is to be shown."""

    prefer: str
    claim: str
    points: int
    """That it speaks of."""
    held: int
    value: float | None
    """The worst point's, or the geometric mean."""
    limit: float
    worst: str = ""
    """Which point that is."""

    @property
    def is_met(self) -> bool:
        return self.points > 0 and self.held == self.points


def fewest_constant(settings: Rows) -> Mapping[str, Any] | None:
    """`jsq` on the least number of nodes that keeps 99 % within the SLO; None if all nodes don't."""
    constant = [row for row in settings if row["policy"] == "jsq"]
    enough = [row for row in constant if (value_of(row, _SLO) or 0.0) >= ENOUGH]
    return min(enough, key=lambda row: row["use_nodes"] or row["nodes"], default=None)


def targets_of(rows: Rows) -> list[Target]:
    """All of them, of the preferences that were run."""
    preferences = [one for one in ("nodes", "speed", "balanced") if any(_is(row, one) for row in rows)]
    found = []
    for prefer in preferences:
        found.append(_attainment(rows, prefer))
        if prefer == "nodes":
            found.append(_nodes(rows))
        elif prefer == "speed":
            found.append(_speed(rows))
        else:
            found += [_undominated(rows), *_goodputs(rows)]
    return found


def _attainment(rows: Rows, prefer: str) -> Target:
    def margin(mine: Mapping[str, Any], settings: Rows) -> float | None:
        others = [value_of(row, _SLO) or 0.0 for row in settings if is_baseline(row)]
        return (value_of(mine, _SLO) or 0.0) - min(max(others), ENOUGH) if others else None

    claim = "attainment 5× minus the lesser of the best baseline's and 99 %"
    return _worst(rows, prefer, claim, margin, limit=-SLACK, is_most=False)


def _nodes(rows: Rows) -> Target:
    def share(mine: Mapping[str, Any], settings: Rows) -> float | None:
        fewest = fewest_constant(settings)
        return None if fewest is None else float(mine["node_seconds"] / fewest["node_seconds"])

    claim = "node-seconds ÷ those of the fewest constant nodes with 99 %"
    return _worst(rows, "nodes", claim, share, limit=FEWEST)


def _speed(rows: Rows) -> Target:
    def share(mine: Mapping[str, Any], settings: Rows) -> float | None:
        others = [row["duration_s"] for row in settings if is_baseline(row)]
        return float(mine["duration_s"] / min(others)) if others else None

    return _worst(rows, "speed", "makespan ÷ the best baseline's", share, limit=BETTER)


def _undominated(rows: Rows) -> Target:
    def worst(mine: Mapping[str, Any], settings: Rows) -> float | None:
        """By how much a baseline is better in both: the lesser of its two advantages, of the worst baseline."""
        factors = [
            min(
                float(row["goodput_per_second"] / mine["goodput_per_second"]),
                float(mine["node_seconds"] / row["node_seconds"]),
            )
            for row in settings
            if is_baseline(row)
        ]
        return max(factors, default=None)

    claim = "a baseline's advantage in both goodput per second and node-seconds"
    return _worst(rows, "balanced", claim, worst, limit=BETTER)


def _goodputs(rows: Rows) -> list[Target]:
    found = []
    ours = f"{OURS} · balanced"
    for other, limit in (("separate", 2.0), ("lemix-paper", 1.2)):
        values = ratios(rows, ours, other, _GOODPUT)
        mean = geometric_mean(values)
        found.append(_one(f"{_GOODPUT} ÷ {other}'s, geometric mean", mean, limit))
        if other == "separate":
            most = max(values, default=None)
            found.append(_one(f"{_GOODPUT} ÷ {other}'s, at the best point", most, 4.0))
    return found


def _one(claim: str, value: float | None, limit: float) -> Target:
    is_held = value is not None and value >= limit
    return Target(
        prefer="balanced",
        claim=claim,
        points=int(value is not None),
        held=int(is_held),
        value=value,
        limit=limit,
    )


def _worst(
    rows: Rows, prefer: str, claim: str, measured: Any, *, limit: float, is_most: bool = True
) -> Target:
    """How many points keep a limit that is the most (or the least) allowed."""
    values: list[tuple[float, Mapping[str, Any]]] = []
    for settings in by_place(rows).values():
        mine = next((row for row in settings if _is(row, prefer)), None)
        value = measured(mine, settings) if mine is not None else None
        if mine is not None and value is not None:
            values.append((value, mine))
    held = sum(value <= limit + 1e-9 if is_most else value >= limit - 1e-9 for value, _ in values)
    worst = (max if is_most else min)(values, key=lambda one: one[0], default=None)
    return Target(
        prefer=prefer,
        claim=claim,
        points=len(values),
        held=held,
        value=None if worst is None else worst[0],
        limit=limit,
        worst="" if worst is None else point_in_words(worst[1]),
    )


def point_in_words(row: Mapping[str, Any]) -> str:
    """Where it was."""
    return f"{row['model']}, λ {row['rate']:g}, r {row['training_rate']:g}, seed {row['seed']}"


def as_objects(targets: Sequence[Target]) -> list[dict[str, object]]:
    """For summary.json."""
    return [
        {
            "name": f"{one.prefer}: {one.claim}",
            "value": one.value,
            "limit": one.limit,
            "points": one.points,
            "held": one.held,
            "worst": one.worst,
            "met": one.is_met,
        }
        for one in targets
    ]


def _is(row: Mapping[str, Any], prefer: str) -> bool:
    is_whole = all(row[name] for name in ("uses_profile", "prioritises", "checks_memory"))
    return row["policy"] == OURS and row["prefer"] == prefer and is_whole
