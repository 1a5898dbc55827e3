"""A generation as it comes: an iterator of chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty
from types import TracebackType
from typing import Self

from lemix.answers import Chunk, Generation
from lemix.futures import Future
from lemix.replies import TokensGenerated
from lemix.waiting import WaitingItem
from lemix_common.errors import WaitTimeout
from lemix_common.ids import ItemId
from lemix_common.stopped_text import StoppedText


@dataclass(eq=False)
class TokenStream(Iterator[Chunk]):
    """Chunks in order, each token once; left before its end (``close``, or ``with``), it cancels the item."""

    _item: WaitingItem
    _deadline: float | None = None
    _text: StoppedText = field(init=False)
    _num_shown: int = 0
    _is_over: bool = False

    def __post_init__(self) -> None:
        self._text = self._item.new_text()

    @property
    def item_id(self) -> ItemId:
        """The item that generates."""
        return self._item.future.item_id

    @property
    def future(self) -> Future[Generation]:
        """The whole generation."""
        return self._item.future

    def __next__(self) -> Chunk:
        if self._is_over:
            raise StopIteration
        match self._next_news():
            case TokensGenerated(index=index, tokens=tokens, weights_version=version, logprobs=logprobs):
                self._num_shown = index + len(tokens)
                return Chunk(
                    index=index,
                    tokens=tokens,
                    text=self._text.add(tokens),
                    weights_version=version,
                    logprobs=logprobs,
                    at_s=self._item.heard_s(index),
                )
            case _:
                return self._last_chunk()

    def close(self) -> None:
        """Stop; an item that goes on is cancelled."""
        if not self._is_over:
            self._is_over = True
            self._item.future.cancel()
            self._item.news.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next_news(self) -> object:
        wait_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            return self._item.news.get(timeout=wait_s)
        except Empty:
            raise WaitTimeout(
                f"item {self.item_id} has not ended in time; it goes on: ask with result({str(self.item_id)!r}), "
                "or cancel it"
            ) from None

    def _last_chunk(self) -> Chunk:
        """The end, with whatever the stream hadn't brought; an item without an answer raises here."""
        if self._is_over:
            raise StopIteration
        self._is_over = True
        answer = self.future.result(0)
        rest = answer.tokens[self._num_shown :]
        return Chunk(
            index=len(answer.tokens) - len(rest),
            tokens=rest,
            text=self._text.add(rest) + self._text.end(),
            weights_version=answer.version_spans[-1][1],
            logprobs=answer.logprobs[self._num_shown :],
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            at_s=answer.response_s,
        )
