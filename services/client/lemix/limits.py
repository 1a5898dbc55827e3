"""What to do with an item that is longer than the model's context: pure functions of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from lemix_common.errors import OverLong

Ids = tuple[int, ...]


def reject_over_long(prompt: Sequence[int], num_following: int, what: str, context_length: int) -> None:
    """Refuse a prompt that, with the tokens that follow it, doesn't fit; the error names both lengths."""
    total = len(prompt) + num_following
    if total > context_length:
        raise OverLong(
            f"{len(prompt)} prompt + {num_following} {what} tokens = {total}, but the model's context is "
            f"{context_length} tokens: shorten it, or choose another --over-long rule"
        )


def truncate_prompt(prompt: Ids, num_following: int, what: str, context_length: int) -> Ids:
    """The prompt's end that fits before the tokens that follow it; at least one token must."""
    room = context_length - num_following
    if room < 1:
        advice = "shorten it, or for training --over-long split" if what == "reference" else "ask for fewer"
        raise OverLong(
            f"{num_following} {what} tokens leave no room for a prompt in the model's context of "
            f"{context_length} tokens: {advice}"
        )
    return prompt[-room:]


def split_example(prompt: Ids, reference: Ids, context_length: int) -> list[tuple[Ids, Ids]]:
    """Cut an example into parts that fit; each reference token is in exactly one.

    Every part has the prompt before it; of a prompt over half the context, its end.
    """
    if len(prompt) + len(reference) <= context_length:
        return [(prompt, reference)]
    if context_length < 2:
        raise OverLong(f"a context of {context_length} tokens holds no training example")
    kept = prompt[-(context_length // 2) :]
    room = context_length - len(kept)
    return [(kept, reference[start : start + room]) for start in range(0, len(reference), room)]
