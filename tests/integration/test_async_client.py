from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from integration.scripted_worker import ScriptedWorker
from lemix import AsyncClient, Client, ScoreItem
from lemix_common.clock import wait_until
from lemix_common.errors import ItemCancelled, WaitTimeout

SOON_S = 10.0
T = TypeVar("T")


def with_worker(worker: ScriptedWorker, coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns while the worker works."""
    with worker.runs():
        return asyncio.run(coroutine)


def test_the_same_verbs(client: Client, worker: ScriptedWorker) -> None:
    """Everything that `Client` does, awaited."""

    async def talk() -> tuple[float, str, str, int]:
        asynchronous = AsyncClient(client=client)
        score, generation = await asyncio.gather(
            asynchronous.score([1], [10], timeout=SOON_S), asynchronous.generate("né", 3, timeout=SOON_S)
        )
        learned = await asynchronous.train("a", "b")
        version = await asynchronous.flush(SOON_S)
        return score.loss, generation.text, version, (await learned).step

    assert with_worker(worker, talk()) == (0.1, "né", "0.1", 1)


def test_a_stream_is_iterated(client: Client, worker: ScriptedWorker) -> None:
    """Chunk by chunk, whole characters only."""

    async def read() -> list[str]:
        stream = AsyncClient(client=client).stream("né", 3, timeout=SOON_S)
        return [chunk.text async for chunk in stream if chunk.text]

    assert with_worker(worker, read()) == ["n", "é"]


def test_a_time_out_leaves_the_item_going(client: Client) -> None:
    """As with `Client`."""

    async def wait() -> str:
        asynchronous = AsyncClient(client=client)
        with pytest.raises(WaitTimeout):
            await asynchronous.score([1], [10], timeout=0.01)
        queues = (await asynchronous.status())["queues"]
        return str(queues["submissions"]["depth"])

    assert asyncio.run(wait()) == "1"


def test_a_cancelled_task_cancels_its_item(client: Client) -> None:
    """Nobody waits for it any more."""

    async def leave() -> None:
        task = asyncio.create_task(AsyncClient(client=client).score([1], [10]))
        await asyncio.to_thread(wait_for_total, client, "submitted")
        task.cancel()
        await asyncio.to_thread(wait_for_total, client, "cancelled")

    asyncio.run(leave())


def test_a_cancelled_future_cancels_its_item(client: Client) -> None:
    """The same for what ``submit`` returned."""

    async def leave() -> None:
        future = await AsyncClient(client=client).submit(ScoreItem([1], [10]))
        future.cancel()
        await asyncio.to_thread(wait_for_total, client, "cancelled")

    asyncio.run(leave())


def test_an_item_can_be_cancelled_by_its_id(client: Client) -> None:
    """As with `Client`."""

    async def cancel() -> None:
        asynchronous = AsyncClient(client=client)
        future = await asynchronous.submit(ScoreItem([1], [10], item_id="mine"))
        assert await asynchronous.cancel("mine")
        with pytest.raises(ItemCancelled):
            await asyncio.wait_for(future, SOON_S)

    asyncio.run(cancel())


def wait_for_total(client: Client, name: str) -> None:
    """Return when one item was counted under this name."""
    wait_until(lambda: client.status()["totals"].get(name) == 1, what=f"an item is {name}", timeout_s=SOON_S)
