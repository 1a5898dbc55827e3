"""The text of a generation as its reader may see it: nothing behind a stop, nor what may yet become one.

The worker that decides what ends a request and the client that shows its text run this same code over the same tokens,
so the text ends at the client where it ended at the worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lemix_common.sampling import NO_STOPS, Stopping, stopping_of
from lemix_common.text_stream import Decode, TextStream


@dataclass
class StoppedText:
    """The text so far, in pieces; what could be the beginning of a stop string is held back until that is decided."""

    stream: TextStream
    stopping: Stopping = NO_STOPS
    min_tokens: int = 0
    """A stop string that is complete within so many tokens doesn't count."""
    ending_ids: frozenset[int] = frozenset()
    """Tokens that end the generation; unless stops are included, they aren't text."""
    matched: str | None = None
    """The stop string that ended the text."""
    _num_tokens: int = 0
    _held: str = ""

    def add(self, tokens: Iterable[int]) -> str:
        """What may be shown now that these tokens are there."""
        return "".join(map(self._add_one, tokens))

    def end(self) -> str:
        """What was held back; there will be no more tokens."""
        shown = self._take(self.stream.end())
        rest, self._held = self._held, ""
        return shown + rest

    def _add_one(self, token: int) -> str:
        self._num_tokens += 1
        if token in self.ending_ids and not self.stopping.include_stop:
            return ""
        return self._take(self.stream.add([token]))

    def _take(self, piece: str) -> str:
        if self.matched is not None:
            return ""
        text, num_held = self._held + piece, len(self._held)
        found = None
        if self._num_tokens > self.min_tokens:
            found = first_stop(text, self.stopping.stop_strings, after=num_held)
        if found is not None:
            begin, self.matched = found
            self._held = ""
            return text[: begin + len(self.matched)] if self.stopping.include_stop else text[:begin]
        cut = _undecided_from(text, self.stopping.stop_strings)
        self._held = text[cut:]
        return text[:cut]


def stopped_text_of(fields: Mapping[str, str], *, eos_ids: Sequence[int], decode: Decode) -> StoppedText:
    """The text of an item, still empty."""
    prompt_end: list[int] = list(json.loads(fields.get("prompt_end") or "[]"))
    return StoppedText(
        TextStream(decode, prompt_end),
        stopping_of(fields),
        int(fields.get("min_tokens") or 0),
        frozenset(ending_ids_of(fields, eos_ids=eos_ids)),
    )


def ending_ids_of(fields: Mapping[str, str], *, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end an item: its own, and the model's unless it ignores them."""
    model_ids = () if fields.get("ignore_eos") == "1" else tuple(eos_ids)
    return tuple(dict.fromkeys((*stopping_of(fields).stop_ids, *model_ids)))


def first_stop(text: str, strings: Iterable[str], *, after: int) -> tuple[int, str] | None:
    """Where the first stop string to be complete behind ``after`` begins, and which it is; of equals the longest."""
    found = []
    for string in strings:
        begin = text.find(string, max(0, after - len(string) + 1))
        if begin >= 0:
            found.append((begin + len(string), begin, string))
    _, begin, string = min(found, default=(0, 0, ""))
    return (begin, string) if string else None


def _undecided_from(text: str, strings: Sequence[str]) -> int:
    """Where the longest end of the text begins that a stop string may begin with."""

    def may_begin(end: str) -> bool:
        return any(len(string) > len(end) and string.startswith(end) for string in strings)

    starts = range(max(0, len(text) - max(map(len, strings), default=0)), len(text))
    return next((start for start in starts if may_begin(text[start:])), len(text))
