"""What a piece of work costs on each stage of an idle node: the profile's lines, worked out once a decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lemix_common.costs import Cost, Profile, RowSteps, computed_rows
from lemix_coordinator.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds and bytes of one work, a figure a stage."""

    forward_S: tuple[float, ...]
    backward_S: tuple[float, ...]
    """With the optimizer's step behind it; empty of what doesn't train."""
    hop_s: float
    """From the end of a forward on a stage to its begin on the next; below 0 where later chunks are still to come."""
    bytes_S: tuple[float, ...]
    """Held from the forward to the end: activations of training, keys and values of a request."""

    @property
    def idle_s(self) -> float:
        """From the first stage to the end of the last forward on an idle node."""
        return sum(self.forward_S) + self.hop_s * (len(self.forward_S) - 1)

    @property
    def busiest_s(self) -> float:
        """What it takes of the stage that it takes most of: a node does one such work in this time, pipelined."""
        return (
            max(map(sum, zip(self.forward_S, self.backward_S, strict=True)))
            if self.backward_S
            else max(self.forward_S)
        )

    @property
    def total_s(self) -> float:
        """Of all stages together, the backward included, with the hops: what it takes alone on a node."""
        there_and_back = 2 if self.backward_S else 1
        hops_s = self.hop_s * (len(self.forward_S) - 1) * there_and_back
        return sum(self.forward_S) + sum(self.backward_S) + hops_s


def pass_times(profile: Profile, work: Work) -> PassTimes:
    """What the profile's lines say of this work."""
    lengths = work.lengths
    tokens = sum(lengths)
    contexts = sum([length * length for length in lengths])
    stages = profile.stages
    hop = profile.hop
    hop_s = hop.base + hop.token * tokens
    forward_S = tuple(
        [
            cost.base + cost.token * tokens + cost.context * contexts
            for cost in [stage.forward_of(is_training=work.kind == "train") for stage in stages]
        ]
    )
    if work.kind != "train":
        kept = tokens + len(lengths) * work.new_tokens
        if 0 < work.chunk_tokens < tokens:
            forward_S, early_s = _in_chunks(profile, work, forward_S)
            hop_s -= early_s
        return PassTimes(forward_S, (), hop_s, tuple([stage.kv_token_bytes * kept for stage in stages]))
    return PassTimes(
        forward_S,
        tuple(
            [
                cost.base + cost.token * tokens + cost.context * contexts + optimizer_s
                for cost, optimizer_s in [(stage.backward, stage.optimizer_s) for stage in stages]
            ]
        ),
        hop_s,
        tuple(
            [
                cost.base + cost.token * tokens + cost.context * contexts
                for cost in [stage.activation_bytes for stage in stages]
            ]
        ),
    )


def _in_chunks(profile: Profile, work: Work, forward_S: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """The forwards of a request that is computed in several passes, and how much earlier the next stage has the first.

    The stages behind end a last chunk later than the ones before: what they compute meanwhile is all others.
    """
    num_others = -(-work.tokens // work.chunk_tokens) - 1
    lines = [stage.forward for stage in profile.stages]
    others = num_others * work.chunk_tokens
    others_s = min([line.of(others, others * others) + (num_others - 1) * line.base for line in lines])
    longer_S = [seconds + num_others * line.base for seconds, line in zip(forward_S, lines, strict=True)]
    return tuple(longer_S), others_s


@dataclass(frozen=True, slots=True)
class Iteration:
    """A decode iteration through the whole pipeline, a line over rows and the tokens that these attend to."""

    line: Cost
    """Over the rows that are computed; their hidden states travel, too."""
    row_steps: RowSteps

    def of(self, rows: float, contexts: float) -> float:
        """Seconds of one in which so many rows get a token."""
        return self.line.of(computed_rows(rows, self.row_steps), contexts)

    def of_all(self, rows_N: NDArray[np.float64], contexts_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same on many nodes."""
        if self.row_steps:
            mosts, steps = np.array(self.row_steps).T
            step_N = steps[np.minimum(np.searchsorted(mosts, rows_N), len(steps) - 1)]
            rows_N = np.ceil(rows_N / step_N) * step_N
        seconds_N: NDArray[np.float64] = (
            self.line.base + self.line.token * rows_N + self.line.context * contexts_N
        )
        return seconds_N


def iteration_of(profile: Profile) -> Iteration:
    """The sum over the stages, with a hop behind each (the last one's brings the token back).

    Stages are of one kind of accelerator, so their rows are rounded alike.
    """
    num_stages = len(profile.stages)
    line = Cost(
        sum([stage.decode.base for stage in profile.stages]) + profile.hop.base * num_stages,
        sum([stage.decode.token for stage in profile.stages]) + profile.hop.token * num_stages,
        sum([stage.decode.context for stage in profile.stages]),
    )
    return Iteration(line, profile.stages[0].row_steps)
