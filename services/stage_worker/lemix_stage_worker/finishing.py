"""What ends a request, token by token: its length, the model's end, a stop id or a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lemix_common.logprobs import TokenLogprob
from lemix_common.sampling import Stopping, stopping_of
from lemix_common.stopped_text import StoppedText, ending_ids_of, stopped_text_of
from lemix_common.text_stream import Decode


class Finish(NamedTuple):
    """Why a request is complete."""

    reason: Literal["stop", "length"]
    stop: int | str | None = None
    """The request's own stop id or string; None for its length and the model's end."""


@dataclass(eq=False)
class Finishing:
    """Follows one request's tokens to its end; those of earlier attempts first."""

    stopping: Stopping
    stop_ids: tuple[int, ...]
    """All ids that end it: the model's too, unless they are ignored."""
    max_new_tokens: int
    text: StoppedText | None
    """None without stop strings: nothing is decoded then."""
    num_tokens: int = 0
    finish: Finish | None = None

    def add(self, token: int) -> Finish | None:
        """The next token; why it is the last, if it is."""
        if self.finish is None:
            self.num_tokens += 1
            self.finish = self._finish(token)
        return self.finish

    def result(self, tokens: Sequence[int], logprobs: Sequence[str] = ()) -> dict[str, object]:
        """What a request that has ended answers, as it is stored."""
        if self.finish is None:
            raise ValueError("the request has not ended")
        result: dict[str, object] = {"tokens": list(tokens), "finish_reason": self.finish.reason}
        if self.finish.stop is not None:
            result["stop_reason"] = self.finish.stop
        if logprobs:
            result["logprobs"] = [TokenLogprob.parse(text) for text in logprobs]
        return result

    def _finish(self, token: int) -> Finish | None:
        if token in self.stop_ids:
            return Finish("stop", token if token in self.stopping.stop_ids else None)
        is_last = self.num_tokens >= self.max_new_tokens
        if self.text is not None:
            self.text.add([token])
            if is_last:
                self.text.end()
            if self.text.matched is not None:
                return Finish("stop", self.text.matched)
        return Finish("length") if is_last else None


def finishing_of(
    fields: Mapping[str, str], *, eos_ids: Sequence[int], tokens: Sequence[int], decode: Decode
) -> Finishing:
    """What ends an item, with the tokens it has already; ``decode`` is called for stop strings only."""
    stopping = stopping_of(fields)
    text = stopped_text_of(fields, eos_ids=eos_ids, decode=decode) if stopping.stop_strings else None
    finishing = Finishing(
        stopping=stopping,
        stop_ids=ending_ids_of(fields, eos_ids=eos_ids),
        max_new_tokens=int(fields.get("max_new_tokens") or 0),
        text=text,
    )
    for token in tokens:
        finishing.add(token)
    return finishing
