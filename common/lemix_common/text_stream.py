"""Text that grows token by token and never shows half a character.

A token may end inside a character, and a decoder may treat the first token of a text differently (it drops the space
before a word). So the last piece of text already shown is decoded again with what came after it, and only the
difference is shown, once it ends with a whole character. Tokens are taken one by one, so the text doesn't depend on
how they arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_HALF_CHARACTER = "\ufffd"
_LONGEST_PIECE = 16
Decode = Callable[[Sequence[int]], str]


@dataclass
class TextStream:
    """The text of a generation so far, in pieces."""

    decode: Decode
    shown: list[int]
    """Tokens of the last piece shown; at first the prompt's `last_piece`."""
    _waiting: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int]) -> str:
        """The new whole characters that these tokens bring."""
        return "".join(map(self._add_one, tokens))

    def end(self) -> str:
        """What was held back."""
        piece, self._waiting = self._unshown(), []
        return piece

    def _add_one(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._unshown()
        if not piece or piece.endswith(_HALF_CHARACTER):
            return ""
        self.shown, self._waiting = self._waiting, []
        return piece

    def _unshown(self) -> str:
        return self.decode([*self.shown, *self._waiting])[len(self.decode(self.shown)) :]


def last_piece(decode: Decode, prompt: Sequence[int]) -> tuple[int, ...]:
    """The fewest last tokens of a prompt that are a text of whole characters; none if its end isn't one.

    Tokens that the decoder drops at a text's beginning (a prompt that is one space) stay, so that what follows isn't
    taken for the beginning.
    """
    whole: tuple[int, ...] = ()
    for length in range(1, min(len(prompt), _LONGEST_PIECE) + 1):
        text = decode(prompt[-length:])
        if _HALF_CHARACTER not in text:
            whole = tuple(prompt[-length:])
            if text:
                break
    return whole


def text_of(decode: Decode, prompt_end: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of a whole generation: what its stream shows."""
    stream = TextStream(decode, list(prompt_end))
    return stream.add(tokens) + stream.end()
