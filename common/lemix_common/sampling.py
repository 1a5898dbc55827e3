"""How the next token is chosen and what ends a generation, as the client asks for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lemix_common.errors import BadInput

REPETITION_PENALTIES = (0.01, 100.0)
"""Beyond these, logits would overflow."""
MOST_LOGPROBS = 20
MOST_STOP_IDS = 64
MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 256
SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Greedy by default; with a temperature, a choice that the seed and the token's position fix.

    What changes the logits is done in the order of transformers (`GenerationMixin._get_logits_processor`): repetition
    penalty, ``min_tokens``, temperature, top-k, top-p, min-p, each on what the one before left.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens may be chosen; 0 is no limit."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that together have this probability may be chosen."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the most likely one may be chosen; 0 is no limit."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and of what was generated are less likely by it (below 1: more likely); 1 is no change."""
    min_tokens: int = 0
    """No stop id is chosen and no stop string counts before so many tokens are generated."""
    logprobs: int = 0
    """Say each token's log-probability, and those of so many most likely ones; 0 says none."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, self.temperature >= 0, "a finite number, 0 or more")
        _check_whole("top_k", self.top_k, self.top_k >= 0, "0 (no limit) or more")
        _check_number("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, up to 1")
        _check_number("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 (no limit) to 1")
        penalty, (least, most) = self.repetition_penalty, REPETITION_PENALTIES
        wanted = f"a number from {least:g} to {most:g} (1: no change)"
        _check_number("repetition_penalty", penalty, least <= penalty <= most, wanted)
        _check_whole("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")
        within = 0 <= self.logprobs <= MOST_LOGPROBS
        _check_whole("logprobs", self.logprobs, within, f"0 (none) to {MOST_LOGPROBS}")
        _check_whole("seed", self.seed, 0 <= self.seed < SEEDS, "a whole number from 0 to 2**64 - 1")

    @property
    def is_greedy(self) -> bool:
        """No noise: the most likely token, whatever the seed."""
        return self.temperature == 0

    @property
    def needs_history(self) -> bool:
        """The choice depends on the tokens before, not only on their logits."""
        return self.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """What ends a generation, beside the model's own end and its length."""

    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    """The first that is complete in the text ends it; of several that are at the same character, the longest."""
    include_stop: bool = False
    """The text ends behind what stopped it, not before."""

    def __post_init__(self) -> None:
        for name, values, most in (
            ("stop ids", self.stop_ids, MOST_STOP_IDS),
            ("stop strings", self.stop_strings, MOST_STOP_STRINGS),
        ):
            if not isinstance(values, tuple):
                raise BadInput(f"{name} {values!r:.80} can't be used: give a tuple")
            if len(values) > most:
                raise BadInput(f"{len(values)} {name} can't be used: give at most {most}")
        for stop_id in self.stop_ids:
            if type(stop_id) is not int or stop_id < 0:
                raise BadInput(f"stop id {stop_id!r:.80} can't be used: give token ids")
        for string in self.stop_strings:
            _check_stop_string(string)


def sampling_of(fields: Mapping[str, str]) -> Sampling:
    """What an item's fields ask for; a field that isn't there has its default."""
    return Sampling(
        temperature=float(fields.get("temperature") or GREEDY.temperature),
        top_k=int(fields.get("top_k") or GREEDY.top_k),
        top_p=float(fields.get("top_p") or GREEDY.top_p),
        min_p=float(fields.get("min_p") or GREEDY.min_p),
        repetition_penalty=float(fields.get("repetition_penalty") or GREEDY.repetition_penalty),
        min_tokens=int(fields.get("min_tokens") or GREEDY.min_tokens),
        logprobs=int(fields.get("logprobs") or GREEDY.logprobs),
        seed=int(fields.get("seed") or GREEDY.seed),
    )


def stopping_of(fields: Mapping[str, str]) -> Stopping:
    """The same of what ends it."""
    return Stopping(
        stop_ids=tuple(json.loads(fields.get("stop_ids") or "[]")),
        stop_strings=tuple(json.loads(fields.get("stop_strings") or "[]")),
        include_stop=fields.get("include_stop") == "1",
    )


def _check_number(name: str, value: float, is_within: bool, wanted: str) -> None:
    if not (math.isfinite(value) and is_within):
        raise BadInput(f"{name} {value} can't be used: give {wanted}")


def _check_whole(name: str, value: int, is_within: bool, wanted: str) -> None:
    if type(value) is not int or not is_within:
        raise BadInput(f"{name} {value} can't be used: give {wanted}")


def _check_stop_string(string: str) -> None:
    if not isinstance(string, str):
        raise BadInput(f"stop string {string!r:.80} can't be used: give texts")
    if not 0 < len(string) <= LONGEST_STOP_STRING:
        raise BadInput(
            f"a stop string of {len(string)} characters can't be used: give 1 to {LONGEST_STOP_STRING}"
        )
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"a stop string is not valid UTF-8 at character {error.start}") from None


GREEDY = Sampling()
NO_STOPS = Stopping()
