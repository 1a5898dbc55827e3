"""What an emulated accelerator does of its own: how long each piece of work takes there, and what comes of it.

Times are a profile's. What comes of the work is made up, and the same for everybody who asks again: a token is a
fixed function of its item and its position, so an item that is redone elsewhere goes on as it began.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from lemix_common.costs import Profile

SAFEPOINT_S: Final = 0.004
"""A piece of training gives way to serving this often: about a backward through a layer of a large model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """One kind of accelerator, and the model whose costs are known on it."""

    profile: Profile
    vocab_size: int
    """Of the model folder that stands for the real one."""
    eos_ids: tuple[int, ...] = ()
    """No token of ours is one of these, so a generation is as long as it was asked for."""

    def iteration_s(self, stage: int, starts: Sequence[int], lengths: Sequence[int]) -> float:
        """Seconds of an iteration, a row each: the next token of some, prompts or chunks of prompts of others."""
        costs = self.profile.stages[stage]
        contexts = [length * (start + length) for start, length in zip(starts, lengths, strict=True)]
        is_decode = [length == 1 and start > 0 for start, length in zip(starts, lengths, strict=True)]
        decodes = [context for context, decodes in zip(contexts, is_decode, strict=True) if decodes]
        prompts = sum(length for length, decodes in zip(lengths, is_decode, strict=True) if not decodes)
        return costs.iteration_s(prompts, sum(contexts) - sum(decodes), len(decodes), sum(decodes))

    def forward_s(self, stage: int, lengths: Sequence[int]) -> float:
        """Seconds of a training microbatch's forward, of these examples."""
        return self.profile.stages[stage].forward_of(is_training=True).of(sum(lengths), _whole(lengths))

    def backward_s(self, stage: int, lengths: Sequence[int]) -> float:
        """Seconds of its backward."""
        return self.profile.stages[stage].backward.of(sum(lengths), _whole(lengths))

    def optimizer_s(self, stage: int) -> float:
        """Seconds of an optimizer step."""
        return self.profile.stages[stage].optimizer_s

    def activation_bytes(self, stage: int, lengths: Sequence[int]) -> int:
        """What a microbatch takes from its forward to its backward."""
        return round(self.profile.stages[stage].activation_bytes.of(sum(lengths), _whole(lengths)))

    def token_of(self, item: str, position: int) -> int:
        """The token at a position of an item's sequence."""
        token = Random(f"{item}:{position}").randrange(self.vocab_size)
        while token in self.eos_ids:
            token = (token + 1) % self.vocab_size
        return token

    @property
    def device_text(self) -> str:
        """For an operator."""
        profile = self.profile
        return f"emulated {profile.device} ({profile.source} profile of {profile.model})"

    @property
    def logprob(self) -> float:
        """Of any token: all are as likely."""
        return -math.log(self.vocab_size)


def safepoints(seconds: float, at_most_s: float = SAFEPOINT_S) -> Iterator[float]:
    """A piece of work in equal parts of at most so long; none of nothing."""
    num_parts = math.ceil(seconds / at_most_s)
    for _ in range(num_parts):
        yield seconds / num_parts


def _whole(lengths: Sequence[int]) -> int:
    return sum(length * length for length in lengths)
