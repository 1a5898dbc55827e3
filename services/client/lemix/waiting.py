"""One item as its client sees it: the tokens so far and the one end, whatever way the news came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from lemix.answers import Answer, read_answer
from lemix.futures import Future
from lemix.replies import ItemEnded, Reply, TokensGenerated
from lemix.text_stream import Decode, text_of
from lemix_common.errors import ItemCancelled, ItemFailed, LemixError


@dataclass(eq=False)
class WaitingItem:
    """Applies replies idempotently, by position and by the first end; ``news`` feeds a stream of tokens."""

    future: Future[Any]
    kind: str
    prompt_end: tuple[int, ...]
    decode: Decode
    is_accepted: bool = False
    is_foreign: bool = False
    """Its replies went elsewhere (to the client that submitted it) or were heard before: its hash is asked."""
    tokens: list[int] = field(default_factory=list)
    news: SimpleQueue[Reply | None] = field(default_factory=SimpleQueue)

    def missing_before(self, reply: TokensGenerated) -> bool:
        """Tokens before these were never heard of."""
        return reply.index > len(self.tokens)

    def add_tokens(self, reply: TokensGenerated) -> None:
        """Take the tokens that are new."""
        fresh = reply.tokens[len(self.tokens) - reply.index :]
        if not fresh:
            return
        index = len(self.tokens)
        self.tokens += fresh
        self.news.put(
            TokensGenerated(item=reply.item, index=index, tokens=fresh, weights_version=reply.weights_version)
        )

    def end(self, reply: ItemEnded) -> None:
        """Resolve the future, once."""
        if self.future.done():
            return
        outcome = self._outcome(reply)
        if isinstance(outcome, LemixError):
            self.fail(outcome)
            return
        self.future.set_result(outcome)
        self.news.put(reply)

    def fail(self, error: Exception) -> None:
        """There will be no answer here."""
        if not self.future.done():
            self.future.set_exception(error)
        self.news.put(None)

    def _outcome(self, reply: ItemEnded) -> Answer | LemixError:
        match reply.state:
            case "failed":
                return ItemFailed(f"item {reply.item} failed: {reply.reason}")
            case "cancelled":
                return ItemCancelled(f"item {reply.item} was cancelled")
            case "done":
                return read_answer(self.kind, json.loads(reply.result), reply.version_spans, self._text_of)

    def _text_of(self, tokens: Sequence[int]) -> str:
        return text_of(self.decode, self.prompt_end, tokens)
