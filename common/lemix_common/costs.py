"""What work costs on each stage of a model's pipeline: the fitted line behind every prediction.

Seconds (and bytes) = base + token · tokens + context · Σ(length · context), the sum over the sequences of a pass: their
tokens times what these attend to. Of whole sequences that is Σ length²; of a decode iteration, a token a row, the sum
of the rows' contexts.

Where products are computed for rounded numbers of rows (processors with rearranged matrices), an iteration of a few
rows too many costs a step more: `StageCosts.row_steps` says so, and `computed_rows` is the one place that rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RowSteps = tuple[tuple[int, int], ...]
"""(up to so many rows, their number is rounded up to a multiple of this), ascending; the last holds for more, too.

Empty: each row counts."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A line over tokens and contexts; seconds or bytes."""

    base: float = 0.0
    token: float = 0.0
    context: float = 0.0

    def of(self, tokens: float, contexts: float = 0.0) -> float:
        """What a pass of so many tokens costs whose Σ(length · context) is ``contexts``."""
        return self.base + self.token * tokens + self.context * contexts


def computed_rows(rows: float, steps: RowSteps) -> float:
    """The rows that an iteration of so many computes."""
    if not steps:
        return rows
    step = next((step for most, step in steps if rows <= most), steps[-1][1])
    return math.ceil(rows / step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """One stage on one accelerator."""

    forward: Cost
    """Seconds of a forward over whole sequences: a prompt, a score, a training microbatch."""
    training_forward: Cost | None = None
    """Seconds of a training microbatch's, where that was measured apart: it keeps what its backward needs."""
    backward: Cost
    """Seconds of a training microbatch's backward."""
    decode: Cost
    """Seconds of a decode iteration over the rows that it computes; of those that it has, `decode_s` knows it."""
    row_steps: RowSteps = ()
    """How an iteration's rows are rounded."""
    optimizer_s: float
    """Seconds of an optimizer step."""
    activation_bytes: Cost
    """Of a training microbatch, from its forward to its backward."""
    kv_token_bytes: float
    weight_bytes: int
    training_bytes: int
    """Gradients and optimizer state, beside the weights."""

    def forward_of(self, *, is_training: bool) -> Cost:
        """The line of a request's forward, or of a training microbatch's."""
        return (self.training_forward if is_training else None) or self.forward

    def decode_s(self, rows: float, contexts: float) -> float:
        """Seconds of an iteration in which so many rows get a token each, and attend to ``contexts`` together."""
        return self.decode.of(computed_rows(rows, self.row_steps), contexts)

    def iteration_s(self, prompts: float, prompt_contexts: float, rows: float, row_contexts: float) -> float:
        """Seconds of an iteration: the next token of some rows, and so many tokens of others' prompts.

        One that has both costs what its prompts cost alone, and its decodes on top without a base of their own, nor
        rounding: the prompts' rows are many.
        """
        if not prompts:
            return self.decode_s(rows, row_contexts)
        beside = self.decode.token * rows + self.decode.context * row_contexts
        return self.forward.of(prompts, prompt_contexts) + beside


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model's pipeline on one kind of accelerator."""

    model: str
    device: str
    source: Literal["measured", "roofline"]
    stages: tuple[StageCosts, ...]
    hop: Cost
    """Seconds of a message with the activations of so many tokens to the next stage."""
    memory_bytes: int
    """Of one accelerator."""
    load_s: float
    """From a node that holds nothing to one that serves."""
    held_out_error: Mapping[str, float] = field(default_factory=dict)
    """By kind of work: the median relative error of what wasn't fitted to; of measured profiles only."""

    @property
    def num_stages(self) -> int:
        return len(self.stages)
