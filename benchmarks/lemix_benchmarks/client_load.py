"""Requests as a user's program makes them: streams of the Python client, so many at a time or each at its moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from lemix import Client
from lemix_benchmarks.decoding import Answer, Answered, Request

_TIMEOUT_S: Final = 600.0

AnswerOne = Callable[[Request], Answer]
"""Submits a request now, and comes back with its answer."""


def streamed(client: Client, request: Request) -> Answer:
    """One request, submitted now, token by token."""
    submitted_at = time.monotonic()
    tokens: list[int] = []
    times: list[float] = []
    for chunk in client.stream(list(request.prompt), request.new_tokens, ignore_eos=True, timeout=_TIMEOUT_S):
        tokens += chunk.tokens
        times += [time.monotonic()] * len(chunk.tokens)
    return Answer(request.number, submitted_at, tuple(tokens), tuple(times))


@dataclass(eq=False)
class _HandOut:
    """Requests for whoever is free; knows when the last one was taken."""

    left: Iterator[Request]
    ended: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def take(self) -> Request | None:
        with self._lock:
            request = next(self.left, None)
            if request is not None:
                self.ended = time.monotonic()
            return request


def closed_loop(answer_one: AnswerOne, requests: Sequence[Request], concurrency: int) -> Answered:
    """Keep so many requests running, as long as there are more; that long is measured."""
    handed_out = _HandOut(iter(requests))

    def one_after_another() -> list[Answer]:
        answers = []
        while (request := handed_out.take()) is not None:
            answers.append(answer_one(request))
        return answers

    began = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        users = [pool.submit(one_after_another) for _ in range(concurrency)]
        answers = [answer for user in users for answer in user.result()]
    return Answered(tuple(answers), began, handed_out.ended)


def open_loop(answer_one: AnswerOne, requests: Sequence[Request], arrivals: Sequence[float]) -> Answered:
    """Submit each request at its moment, in seconds from now, whatever became of those before."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(requests)) as pool:
        users = []
        for request, arrival in zip(requests, arrivals, strict=True):
            time.sleep(max(0.0, began + arrival - time.monotonic()))
            users.append(pool.submit(answer_one, request))
        answers = tuple(user.result() for user in users)
    return Answered(answers, began, time.monotonic())
