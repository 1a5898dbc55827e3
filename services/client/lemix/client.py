"""`Client`: submit, stream, wait, cancel, from a user's program. It needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack, overload

from lemix.answers import Answer, Generation, Score, Trained
from lemix.connection import Connection, open_connection
from lemix.discovery import find_cluster
from lemix.flushing import flush, wait_for_version
from lemix.futures import Future
from lemix.inbox import Inbox
from lemix.items import (
    DEFAULT_NEW_TOKENS,
    GenerateItem,
    GenerateOptions,
    Item,
    ScoreItem,
    Text,
    TrainItem,
    answers,
)
from lemix.preparation import PreparedItem, prepare
from lemix.presence import Presence
from lemix.reopening import until_open
from lemix.replies import Reply
from lemix.status import Status, read_status
from lemix.token_stream import TokenStream
from lemix.versions import list_versions, roll_back
from lemix.waiting import WaitingItem
from lemix_common.errors import BadInput, BrokerUnreachable, QueueFull, WaitTimeout
from lemix_common.ids import ItemId, Version, check_item_id, new_item_id
from lemix_common.stopped_text import stopped_text_of
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.items import ENDED, Items


class Client:
    """A cluster's client; may be shared by threads.

    Every item has an id, and submitting an id again is no second item: after any error the same call may be repeated.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        cluster: str | None = None,
        patience_s: float = 60.0,
        on_reply: Callable[[Reply], None] | None = None,
        connection: Connection | None = None,
    ) -> None:
        """Find the cluster by ``url``, then ``LEMIX_URL``, then ``.lemix/cluster.json``.

        A broker that is away is waited for, up to ``patience_s``. ``on_reply`` sees each
        reply to this client, once, in the inbox's thread.
        """
        self._is_own = connection is None
        self._connection = connection or open_connection(find_cluster(url, cluster), patience_s=patience_s)
        self._broker = self._connection.broker
        self._items = Items(self._broker)
        self.name = new_item_id()
        presence = Presence(self._broker, self.name, self._connection.client_expiry_s)
        self._inbox = Inbox(self._broker, self._broker.keys.replies(self.name), presence, on_reply)

    # ---- any item
    @overload
    def submit(self, item: ScoreItem) -> Future[Score]: ...
    @overload
    def submit(self, item: GenerateItem) -> Future[Generation]: ...
    @overload
    def submit(self, item: TrainItem) -> Future[Trained]: ...
    def submit(self, item: Item) -> Future[Any]:
        """Queue an item and return at once. `BadInput` and `Refused`: nothing was queued."""
        return self._submit(self._prepare_one(item)).future

    def result(self, item_id: str, timeout: float | None = None) -> Answer:
        """The answer of an item, whoever submitted it; `ItemUnknown` if there is none, or it has expired."""
        waiting = self._inbox.find(ItemId(item_id)) or self._look_up(check_item_id(item_id))
        answer: Answer = waiting.future.result(timeout)
        return answer

    def cancel(self, item_id: str) -> bool:
        """Take an item back; False if it had ended. `BadInput` if it is a training example of a planned step."""
        return self._items.cancel(item_id)

    # ---- inference
    def score(
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
        return self.submit(item).result(timeout)

    @overload
    def generate(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        n: None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        n: int,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...
    def generate(
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
            return self.submit(item).result(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        futures = self.submit_answers(item, n)
        return [
            future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
            for future in futures
        ]

    def submit_answers(self, item: GenerateItem, n: int) -> list[Future[Generation]]:
        """Queue an item for each of ``n`` answers to its prompt: ids ``NAME.0``, ``NAME.1``, …, seeds counted up.

        If one is refused, those before it are cancelled, unless the caller named them and so may ask again.
        """
        prepared = [self._prepare_one(answer) for answer in answers(item, n)]
        futures: list[Future[Generation]] = []
        try:
            for part in prepared:
                futures.append(self._submit(part).future)  # noqa: PERF401 - what was queued is known if one fails
        except BaseException:
            if item.item_id is None:
                for future in futures:
                    future.cancel()
            raise
        return futures

    def stream(
        self,
        prompt: Text,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> TokenStream:
        """The same, chunk by chunk as it comes, cancelled if this client goes away; ``timeout`` is for the whole."""
        return self.stream_item(GenerateItem(prompt, max_new_tokens, **options), timeout=timeout)

    def stream_item(self, item: GenerateItem, *, timeout: float | None = None) -> TokenStream:
        """The stream of an item of its own making; it ends with this client, unless the item says that it doesn't."""
        if item.while_connected is None:
            item = replace(item, while_connected=True)
        deadline = None if timeout is None else time.monotonic() + timeout
        return TokenStream(self._submit(self._prepare_one(item)), deadline)

    # ---- training
    def train(self, prompt: Text, reference: Text) -> Future[Trained]:
        """Queue a training example; its future ends when the served weights contain it (see `flush`)."""
        return self.submit(TrainItem(prompt, reference))

    def train_many(
        self, examples: Iterable[TrainItem | tuple[Text, Text]], *, timeout: float | None = None
    ) -> list[Future[Trained]]:
        """Queue examples in order: all are checked before the first is queued, a full queue is waited for.

        So is a cluster that closes for a while, as long as a broker that is away. An example whose rule is ``split``
        gives a future for each of its parts.
        """
        items = [example if isinstance(example, TrainItem) else TrainItem(*example) for example in examples]
        prepared = [part for item in items for part in prepare(item, self._connection.tokenization)]
        deadline = None if timeout is None else time.monotonic() + timeout
        return [self._submit_when_there_is_room(part, deadline).future for part in prepared]

    def flush(self, timeout: float | None = None, *, run: str = MAIN_RUN) -> str:
        """Wait until everything submitted before is in the served weights; returns their version."""
        return flush(self._broker, run, timeout_s=timeout)

    def wait_for_version(self, version: str, timeout: float | None = None) -> str:
        """Wait until this version of the current lineage, or a newer one, is served; returns the one that is."""
        return wait_for_version(self._broker, Version.parse(version), timeout_s=timeout)

    def versions(self, count: int = 20) -> list[dict[str, str]]:
        """The newest versions first, published ones and those that have a ``checkpoint`` to go back to."""
        return list_versions(self._broker, count)

    def rollback(self, version: str, timeout: float | None = None) -> str:
        """Serve and train the weights of an earlier version again; returns the new version that has them.

        What had begun finishes on the version it began with, or goes on upon this one, as it asked. Examples of
        later steps stay done: they were learned, and the weights that learned them were left. `BadInput` and
        `ClusterError`: nothing was changed.
        """
        return roll_back(self._broker, Version.parse(version), timeout_s=timeout)

    # ---- the cluster
    def status(self) -> Status:
        """What `lemix status --json` prints."""
        return read_status(self._broker)

    def close(self) -> None:
        """Stop listening; what was submitted goes on, but for open streams and what else is to end with its client."""
        hasty = replace(self._broker, patience_s=0.0)
        with suppress(BrokerUnreachable):  # the cluster finds out by itself
            Items(hasty).leave(self.name)
        self._inbox.close()
        with suppress(BrokerUnreachable):  # the stream expires by itself
            hasty.again(lambda: hasty.client.delete(self._inbox.stream))
        if self._is_own:
            self._broker.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- how
    def _prepare_one(self, item: Item) -> PreparedItem:
        parts = prepare(item, self._connection.tokenization)
        if len(parts) > 1:
            raise BadInput(
                f"the example must be cut into {len(parts)} parts, each with its own future: use train_many"
            )
        return parts[0]

    def _submit(self, prepared: PreparedItem) -> WaitingItem:
        now = self._broker.clock.now()
        about = {"client": self.name, "submitted_at": f"{now:.6f}"}
        if prepared.deadline_s is not None:
            about["deadline_at"] = f"{now + prepared.deadline_s:.6f}"
        waiting = self._inbox.expect(self._waiting_item(prepared.item_id, prepared.fields, now))
        try:
            self._items.submit(prepared.item_id, prepared.fields | about, prepared.payload)
            if prepared.is_named:
                self._recognize(waiting, prepared.kind)
        except BaseException:
            if not waiting.is_accepted:
                self._inbox.forget(prepared.item_id)
            raise
        waiting.is_accepted = True
        if waiting.is_foreign:
            self._inbox.wake()
        return waiting

    def _recognize(self, waiting: WaitingItem, kind: str) -> None:
        """An id of the caller's may be that of an earlier item, whose replies went elsewhere or were heard before."""
        item_id = waiting.future.item_id
        known = self._items.get(item_id)
        if known["kind"] != kind:
            raise BadInput(
                f"item {item_id} exists and is to {known['kind']}, not to {kind}: choose another id"
            )
        waiting.is_foreign = known["client"] != self.name or known["state"] in ENDED

    def _submit_when_there_is_room(self, prepared: PreparedItem, deadline: float | None) -> WaitingItem:
        patience_s = self._broker.patience_s
        if deadline is not None:
            patience_s = min(patience_s, deadline - time.monotonic())
        while True:
            try:
                return until_open(
                    lambda: self._submit(prepared), clock=self._broker.clock, patience_s=patience_s
                )
            except QueueFull as full:
                if deadline is not None and time.monotonic() > deadline:
                    raise WaitTimeout(
                        f"{full}; item {prepared.item_id} and those after it were not queued"
                    ) from None
                self._broker.clock.sleep(full.retry_after_s)

    def _look_up(self, item_id: ItemId) -> WaitingItem:
        """Wait for an item that this client doesn't know yet."""
        waiting = self._waiting_item(item_id, self._items.get(item_id), self._broker.clock.now())
        waiting.is_accepted = waiting.is_foreign = True
        waiting = self._inbox.expect(waiting)
        self._inbox.wake()
        return waiting

    def _waiting_item(self, item_id: ItemId, fields: Mapping[str, object], now: float) -> WaitingItem:
        about = {name: str(value) for name, value in fields.items()}
        tokenization = self._connection.tokenization
        return WaitingItem(
            Future(item_id, self.cancel),
            str(fields["kind"]),
            new_text=lambda: stopped_text_of(
                about, eos_ids=tokenization.card.eos_token_ids, decode=tokenization.decode
            ),
            clock=self._broker.clock,
            submitted_at=now,
            is_bound="while_connected" in fields and fields.get("client", self.name) == self.name,
        )
