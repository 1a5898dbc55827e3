"""What a client gets: one frozen value a kind of item, each naming the weights it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lemix_common.logprobs import TokenLogprob

FinishReason = Literal["length", "stop"]
StopReason = int | str | None
"""The request's own stop id or string that ended it; None for its length and the model's own end."""
VersionSpans = tuple[tuple[int, str], ...]
"""The index of the first token of each weight version, and the version."""


@dataclass(frozen=True, slots=True)
class Score:
    """The mean negative log-probability of a reference, and each token's log-probability."""

    loss: float
    logprobs: tuple[float, ...]
    weights_version: str
    response_s: float | None = field(default=None, compare=False, kw_only=True)
    """From submission to the answer, by the clock of the client that submitted it; None for other clients."""


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
    stop_reason: StopReason = field(default=None, kw_only=True)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), kw_only=True)
    """One a token, if asked for (`Sampling.logprobs`)."""
    response_s: float | None = field(default=None, compare=False, kw_only=True)
    """From submission to the end, by the clock of the client that submitted it; None for other clients."""
    token_times_s: tuple[float, ...] = field(default=(), compare=False, kw_only=True)
    """From submission to each token, by the same clock: gaps between them are the inter-token latencies."""

    @property
    def ttft_s(self) -> float | None:
        """From submission to the first token."""
        return self.token_times_s[0] if self.token_times_s else None


@dataclass(frozen=True, slots=True)
class Trained:
    """The step that learned an example; the served weights of ``weights_version`` contain it."""

    step: int
    step_loss: float
    weights_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some more tokens of a generation.

    Its ``text`` holds whole characters only, and no beginning of what may yet become a stop string; it may be empty.
    """

    index: int
    """Position of the first of ``tokens`` in the generation."""
    tokens: tuple[int, ...]
    text: str
    weights_version: str
    finish_reason: FinishReason | None = None
    """Set in the last chunk, which has no tokens (but text, if some was held back)."""
    stop_reason: StopReason = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, if asked for."""
    at_s: float | None = field(default=None, compare=False)
    """When it came, in seconds from submission; None if another client submitted the item."""


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
            return Generation(
                text_of(tokens),
                tokens,
                result["finish_reason"],
                weights_version,
                spans,
                stop_reason=result.get("stop_reason"),
                logprobs=tuple(map(TokenLogprob.of, result.get("logprobs", ()))),
            )
        case "train":
            return Trained(int(result["step"]), float(result["step_loss"]), weights_version)
        case _:
            raise ValueError(f"no kind of item is called {kind!r}")
