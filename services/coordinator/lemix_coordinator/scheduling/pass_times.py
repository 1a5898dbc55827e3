"""What a piece of work costs on each stage of an idle node: the profile's lines, worked out once a decision."""

from __future__ import annotations

from dataclasses import dataclass

from lemix_common.costs import Profile
from lemix_coordinator.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds and bytes of one work, a figure a stage."""

    forward_S: tuple[float, ...]
    backward_S: tuple[float, ...]
    """With the optimizer's step behind it; empty of what doesn't train."""
    hop_s: float
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


@dataclass(frozen=True, slots=True)
class Iteration:
    """A decode iteration through the whole pipeline, a line over rows and the tokens that these attend to."""

    base_s: float
    row_s: float
    context_s: float


def iteration_of(profile: Profile) -> Iteration:
    """The sum over the stages, with a hop behind each (the last one's brings the token back)."""
    num_stages = len(profile.stages)
    return Iteration(
        sum([stage.decode.base for stage in profile.stages]) + profile.hop.base * num_stages,
        sum([stage.decode.token for stage in profile.stages]) + profile.hop.token * num_stages,
        sum([stage.decode.context for stage in profile.stages]),
    )
