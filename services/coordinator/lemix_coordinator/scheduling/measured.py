"""A profile of what a worker measured: each stage's lines fitted, each line's error on samples it hasn't seen.

What the worker measured is told by the kinds of its spans. Prompts and scores are one line, `forward`. Training's
forward has one of its own: it keeps what the backward needs, layer by layer, and its matrices aren't rearranged for
few rows; on a processor it takes a fifth more. Where a stage rounds an iteration's rows (`row_steps`), its decodes are
a line over the rows that are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from lemix_common.costs import Profile, RowSteps, StageCosts, computed_rows
from lemix_coordinator.scheduling.fitting import Fit, Sample, fit

SCHEMA: Final = 2
"""Of what the worker writes."""
LINES: Final[Mapping[str, str]] = {
    "forward": "prefill",
    "training_forward": "training_forward",
    "backward": "training_backward",
    "decode": "decode",
}
"""The lines of seconds, and the kind of spans that each is fitted to."""


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """A profile, and what it was fitted to."""

    profile: Profile
    fits: tuple[Mapping[str, Fit], ...]
    """By stage, of each of `LINES`."""


def measured_profile(model: str, found: Mapping[str, Any]) -> MeasuredProfile:
    """The profile of a model from what ``python -m lemix_stage_worker.profiling`` found."""
    if found.get("schema") != SCHEMA:
        raise ValueError(f"measurements of schema {found.get('schema')!r}, not {SCHEMA}")
    fits = tuple(_fits(stage["samples"], _row_steps(stage)) for stage in found["stages"])
    hop = fit([Sample(hop["tokens"], 0, hop["seconds"]) for hop in found["hops"]])
    errors = {line: _median_error([of_stage[line] for of_stage in fits]) for line in LINES}
    errors["hop"] = hop.held_out_error
    profile = Profile(
        model=model,
        device=found["device"],
        source="measured",
        stages=tuple(_costs(stage, of_stage) for stage, of_stage in zip(found["stages"], fits, strict=True)),
        hop=hop.cost,
        memory_bytes=found["memory_bytes"],
        load_s=max(stage["load_s"] for stage in found["stages"]),
        held_out_error={line: error for line, error in errors.items() if error is not None},
    )
    return MeasuredProfile(profile, fits)


def _fits(samples: Sequence[Mapping[str, Any]], row_steps: RowSteps) -> dict[str, Fit]:
    def sample(of: Mapping[str, Any]) -> Sample:
        computed = computed_rows(of["tokens"], row_steps if of["kind"] == LINES["decode"] else ())
        return Sample(computed, of["contexts"], of["seconds"])

    return {
        line: fit([sample(found) for found in samples if found["kind"] == kind])
        for line, kind in LINES.items()
    }


def _row_steps(stage: Mapping[str, Any]) -> RowSteps:
    return tuple((most, step) for most, step in stage["row_steps"])


def _costs(stage: Mapping[str, Any], fits: Mapping[str, Fit]) -> StageCosts:
    kept = [Sample(kept["tokens"], kept["contexts"], kept["bytes"]) for kept in stage["activations"]]
    return StageCosts(
        forward=fits["forward"].cost,
        training_forward=fits["training_forward"].cost,
        backward=fits["backward"].cost,
        decode=fits["decode"].cost,
        row_steps=_row_steps(stage),
        optimizer_s=stage["optimizer_s"],
        activation_bytes=fit(kept).cost,
        kv_token_bytes=stage["kv_token_bytes"],
        weight_bytes=stage["weight_bytes"],
        training_bytes=stage["training_bytes"],
    )


def _median_error(fits: Sequence[Fit]) -> float | None:
    errors = [error for fit in fits for error in fit.errors]
    return median(errors) if errors else None
