"""What a client asks for: one frozen value a kind of item.

A prompt or reference is a text, tokenized as the cluster's tokenizer says, or a list of token ids, taken as it is
(no special token is added).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lemix_common.sampling import GREEDY, Sampling

Text = str | Sequence[int]
OverLongRule = Literal["reject", "truncate", "split"]
"""What to do with an item over the model's context: refuse it, keep the prompt's end, or (training) cut it in parts."""
UpdateRule = Literal["finish", "rebuild"]
"""What a running request does when newer weights are served: finish on its own, or rebuild its cache on these."""

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """How likely is ``reference`` after ``prompt``?"""

    prompt: Text
    reference: Text
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """Go on from ``prompt``, until the model ends or ``max_new_tokens`` are there."""

    prompt: Text
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling = field(default=GREEDY, kw_only=True)
    ignore_eos: bool = field(default=False, kw_only=True)
    on_update: UpdateRule | None = field(default=None, kw_only=True)
    """None: as the cluster's setting says."""
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)


@dataclass(frozen=True, slots=True)
class TrainItem:
    """Learn to say ``reference`` after ``prompt``; the loss is over the reference only."""

    prompt: Text
    reference: Text
    run: str = field(default="main", kw_only=True)
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)
    where: str = field(default="", kw_only=True)
    """File and line it was read from, for the error that refuses it."""


Item = ScoreItem | GenerateItem | TrainItem
