"""What is to be placed, and what a policy answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WorkKind = Literal["score", "generate", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An item as the scheduler sees it: a request, or a piece of training that runs on one node.

    In the paper's experiments an item is a batch of rows; elsewhere it has one.
    """

    item: str
    number: int
    """Its place among all that was submitted, from 0: what `naive-mix` deals by."""
    kind: WorkKind
    lengths: tuple[int, ...]
    """Tokens of each row, prompt and reference, without padding."""
    arrived_at: float
    """Seconds."""
    new_tokens: int = 0
    """Of `generate`: tokens of each row, at most."""
    chunk_tokens: int = 0
    """Of a request: the most of its tokens that share a pass, behind which the next stage begins; 0: all do."""

    @property
    def is_training(self) -> bool:
        return self.kind == "train"

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.lengths)

    @property
    def contexts(self) -> int:
        """Σ(length · context) of a pass over the whole rows."""
        return sum(length * length for length in self.lengths)

    @property
    def decoded_contexts(self) -> int:
        """Tokens that the rows attend to in an iteration, halfway through the answer."""
        return sum(self.lengths) + len(self.lengths) * (self.new_tokens // 2)

    @property
    def padded_length(self) -> int:
        """Tokens of the longest row: the length that the paper's rules speak of."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a piece of work goes."""

    node: int | None
    """None: nowhere yet; ask again when anything has changed, or at `again_at`."""
    reason: str = ""
    """For logs and reports; a word or two, no figures."""
    again_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """Nodes that are to hold the model from now on, and such that are to give it up when they have nothing left."""

    open: tuple[int, ...] = ()
    close: tuple[int, ...] = ()
    reason: str = ""
