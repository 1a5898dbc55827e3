"""`AsyncClient`: the same verbs for asyncio; a thin adapter over `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from lemix.answers import Answer, Chunk, Generation, Score, Trained
from lemix.client import Client
from lemix.futures import Future
from lemix.items import DEFAULT_NEW_TOKENS, GenerateItem, GenerateOptions, Item, ScoreItem, Text, TrainItem
from lemix.status import Status
from lemix_common.errors import WaitTimeout

A = TypeVar("A")


class AsyncClient:
    """A cluster's client in an event loop; a task that is cancelled while it waits cancels its item."""

    def __init__(
        self, url: str | None = None, *, cluster: str | None = None, client: Client | None = None
    ) -> None:
        """Find the cluster as `Client` does, or adapt a client that is there."""
        self._client = client or Client(url, cluster=cluster)

    # ---- any item
    @overload
    async def submit(self, item: ScoreItem) -> asyncio.Future[Score]: ...
    @overload
    async def submit(self, item: GenerateItem) -> asyncio.Future[Generation]: ...
    @overload
    async def submit(self, item: TrainItem) -> asyncio.Future[Trained]: ...
    async def submit(self, item: Item) -> asyncio.Future[Any]:
        """Queue an item; the future it returns is awaited for the answer."""
        return asyncio.wrap_future(await self._queue(item))

    async def result(self, item_id: str, timeout: float | None = None) -> Answer:
        """The answer of an item, whoever submitted it."""
        return await asyncio.to_thread(self._client.result, item_id, timeout)

    async def cancel(self, item_id: str) -> bool:
        """Take an item back; False if it had ended."""
        return await asyncio.to_thread(self._client.cancel, item_id)

    # ---- inference
    async def score(
        self,
        prompt: Text,
        reference: Text,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        timeout: float | None = None,
    ) -> Score:
        """How likely the model finds ``reference`` after ``prompt``."""
        item = ScoreItem(prompt, reference, priority=priority, deadline_s=deadline_s)
        return await _answer(await self._queue(item), timeout)

    @overload
    async def generate(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        n: None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...
    @overload
    async def generate(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        n: int,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...
    async def generate(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        n: int | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation]:
        """What the model says after ``prompt``; with ``n`` so many answers. Options are those of `GenerateItem`."""
        item = GenerateItem(prompt, max_new_tokens, **options)
        if n is None:
            return await _answer(await self._queue(item), timeout)
        futures = await asyncio.to_thread(self._client.submit_answers, item, n)
        return await asyncio.gather(*(_answer(future, timeout) for future in futures))

    async def stream(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[Chunk]:
        """The same, chunk by chunk as it comes; left before its end, or its process gone, it cancels the item."""
        item = GenerateItem(prompt, max_new_tokens, **options)
        chunks = await asyncio.to_thread(self._client.stream_item, item, timeout=timeout)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()

    # ---- training
    async def train(self, prompt: Text, reference: Text) -> asyncio.Future[Trained]:
        """Queue a training example; the future it returns ends when the served weights contain it."""
        return await self.submit(TrainItem(prompt, reference))

    async def train_many(
        self, examples: Iterable[TrainItem | tuple[Text, Text]], *, timeout: float | None = None
    ) -> list[asyncio.Future[Trained]]:
        """Queue examples in order; all are checked before the first is queued."""
        futures = await asyncio.to_thread(self._client.train_many, examples, timeout=timeout)
        return [asyncio.wrap_future(future) for future in futures]

    async def flush(self, timeout: float | None = None) -> str:
        """Wait until everything submitted before is in the served weights; returns their version."""
        return await asyncio.to_thread(self._client.flush, timeout)

    # ---- the cluster
    async def status(self) -> Status:
        """What `lemix status --json` prints."""
        return await asyncio.to_thread(self._client.status)

    async def close(self) -> None:
        """Stop listening; what was submitted goes on, but for open streams."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _queue(self, item: Any) -> Future[Any]:
        return await asyncio.to_thread(self._client.submit, item)


async def _answer(future: Future[A], timeout: float | None) -> A:
    waiting = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait([waiting], timeout=timeout)
    except asyncio.CancelledError:
        asyncio.get_running_loop().run_in_executor(None, future.cancel)
        raise
    if not done:
        raise WaitTimeout(f"item {future.item_id} has not ended within {timeout:g} s; it goes on")
    return waiting.result()
