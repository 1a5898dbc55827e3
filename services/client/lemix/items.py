"""What a client asks for: one frozen value a kind of item.

A prompt or reference is a text, tokenized as the cluster's tokenizer says, or a list of token ids, taken as it is
(no special token is added).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from lemix_common.errors import BadInput
from lemix_common.ids import new_item_id
from lemix_common.sampling import GREEDY, NO_STOPS, SEEDS, Sampling, Stopping

Text = str | Sequence[int]
OverLongRule = Literal["reject", "truncate", "split"]
"""What to do with an item over the model's context: refuse it, keep the prompt's end, or (training) cut it in parts."""
UpdateRule = Literal["finish", "rebuild"]
"""What a running request does when newer weights are served: finish on its own, or rebuild its cache on these."""

DEFAULT_NEW_TOKENS = 128
MOST_ANSWERS = 128


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """How likely is ``reference`` after ``prompt``?"""

    prompt: Text
    reference: Text
    priority: int = field(default=0, kw_only=True)
    """From -10 to 10, the higher first: a step is worth 5 s of waiting."""
    deadline_s: float | None = field(default=None, kw_only=True)
    """Seconds from its submission; what hasn't ended by then fails."""
    while_connected: bool | None = field(default=None, kw_only=True)
    """Cancel it when its client is closed or gone. None: only if it is streamed."""
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """Go on from ``prompt``, until the model ends or ``max_new_tokens`` are there."""

    prompt: Text
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling = field(default=GREEDY, kw_only=True)
    stopping: Stopping = field(default=NO_STOPS, kw_only=True)
    ignore_eos: bool = field(default=False, kw_only=True)
    on_update: UpdateRule | None = field(default=None, kw_only=True)
    """None: as the cluster's setting says."""
    priority: int = field(default=0, kw_only=True)
    """From -10 to 10, the higher first: a step is worth 5 s of waiting."""
    deadline_s: float | None = field(default=None, kw_only=True)
    """Seconds from its submission; what hasn't ended by then fails."""
    while_connected: bool | None = field(default=None, kw_only=True)
    """Cancel it when its client is closed or gone. None: only if it is streamed."""
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)


@dataclass(frozen=True, slots=True)
class TrainItem:
    """Learn to say ``reference`` after ``prompt``; the loss is over the reference only."""

    prompt: Text
    reference: Text
    run: str = field(default="main", kw_only=True)
    deadline_s: float | None = field(default=None, kw_only=True)
    """Seconds from its submission; what isn't in a planned step by then fails."""
    item_id: str | None = field(default=None, kw_only=True)
    over_long: OverLongRule = field(default="reject", kw_only=True)
    where: str = field(default="", kw_only=True)
    """File and line it was read from, for the error that refuses it."""


Item = ScoreItem | GenerateItem | TrainItem


class GenerateOptions(TypedDict, total=False):
    """What `Client.generate` and `Client.stream` pass on: as in `GenerateItem`."""

    sampling: Sampling
    stopping: Stopping
    ignore_eos: bool
    on_update: UpdateRule | None
    priority: int
    deadline_s: float | None
    while_connected: bool | None
    item_id: str | None
    over_long: OverLongRule


def answers(item: GenerateItem, count: int) -> list[GenerateItem]:
    """An item for each of several answers to one prompt: seeds and names count up from the item's own."""
    if type(count) is not int or not 1 <= count <= MOST_ANSWERS:
        raise BadInput(f"n {count} can't be used: ask for 1 to {MOST_ANSWERS} answers")
    name, first = item.item_id or new_item_id(), item.sampling
    samplings = [replace(first, seed=(first.seed + number) % SEEDS) for number in range(count)]
    return [
        replace(item, item_id=f"{name}.{number}", sampling=sampling)
        for number, sampling in enumerate(samplings)
    ]
