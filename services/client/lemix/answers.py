"""What a client gets: one frozen value a kind of item, each naming the weights it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["length", "stop"]
VersionSpans = tuple[tuple[int, str], ...]
"""The index of the first token of each weight version, and the version."""


@dataclass(frozen=True, slots=True)
class Score:
    """The mean negative log-probability of a reference, and each token's log-probability."""

    loss: float
    logprobs: tuple[float, ...]
    weights_version: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model said after the prompt."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    weights_version: str
    """Of its first token."""
    version_spans: VersionSpans
    """One pair, unless it went on upon newer weights (see `GenerateItem.on_update`)."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The step that learned an example; the served weights of ``weights_version`` contain it."""

    step: int
    step_loss: float
    weights_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some more tokens of a generation; ``text`` holds whole characters only, and may be empty."""

    index: int
    """Position of the first of ``tokens`` in the generation."""
    tokens: tuple[int, ...]
    text: str
    weights_version: str
    finish_reason: FinishReason | None = None
    """Set in the last chunk, which has no tokens (but text, if half a character was held back)."""


Answer = Score | Generation | Trained


def read_answer(
    kind: str, result: Mapping[str, Any], spans: VersionSpans, text_of: Callable[[Sequence[int]], str]
) -> Answer:
    """The typed answer of an item that is done, from the result that the cluster stored."""
    weights_version = spans[0][1]
    match kind:
        case "score":
            return Score(float(result["loss"]), tuple(map(float, result["logprobs"])), weights_version)
        case "generate":
            tokens = tuple(map(int, result["tokens"]))
            return Generation(text_of(tokens), tokens, result["finish_reason"], weights_version, spans)
        case "train":
            return Trained(int(result["step"]), float(result["step_loss"]), weights_version)
        case _:
            raise ValueError(f"no kind of item is called {kind!r}")
