"""One item as its client sees it: the tokens so far and the one end, whatever way the news came."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from lemix.answers import Answer, Generation, Score, read_answer
from lemix.futures import Future
from lemix.replies import ItemEnded, Reply, TokensGenerated
from lemix_common.clock import Clock
from lemix_common.errors import ItemCancelled, ItemFailed, LemixError
from lemix_common.stopped_text import StoppedText


@dataclass(eq=False)
class WaitingItem:
    """Applies replies idempotently, by position and by the first end; ``news`` feeds a stream of tokens."""

    future: Future[Any]
    kind: str
    new_text: Callable[[], StoppedText]
    """Its text before its first token."""
    clock: Clock
    submitted_at: float
    is_accepted: bool = False
    is_bound: bool = False
    """It ends with its client."""
    is_foreign: bool = False
    """Its replies went elsewhere (to the client that submitted it) or were heard before: its hash is asked."""
    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    """When each came, in seconds from submission."""
    response_s: float | None = None
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
        self.token_times_s += [self.clock.now() - self.submitted_at] * len(fresh)
        self.news.put(
            replace(reply, index=index, tokens=fresh, logprobs=reply.logprobs[index - reply.index :])
        )

    def heard_s(self, index: int) -> float | None:
        """When a token came, or the end (index: behind the last token), in seconds from submission; None if unknown."""
        if self.is_foreign:
            return None
        return self.token_times_s[index] if index < len(self.token_times_s) else self.response_s

    def end(self, reply: ItemEnded) -> None:
        """Resolve the future, once."""
        if self.future.done():
            return
        self.response_s = self.clock.now() - self.submitted_at
        outcome = self._outcome(reply)
        if isinstance(outcome, LemixError):
            self.fail(outcome)
            return
        self.future.set_result(self._with_times(outcome))
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

    def _with_times(self, answer: Answer) -> Answer:
        if self.is_foreign:
            return answer
        match answer:
            case Generation():
                times_s = tuple(self.token_times_s)
                return replace(answer, response_s=self.response_s, token_times_s=times_s)
            case Score():
                return replace(answer, response_s=self.response_s)
            case _:
                return answer

    def _text_of(self, tokens: Sequence[int]) -> str:
        text = self.new_text()
        return text.add(tokens) + text.end()
