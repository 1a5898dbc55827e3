"""Drive a cluster with a workload in real time and gather everything a report needs.

The loop is open: items are submitted when they are due, whatever became of the earlier ones, and always in the trace's
order. While the broker is away, or the cluster closed since its coordinator is being replaced, the item that is due is
submitted again, under the same id, until it is accepted or refused; the next ones are late then, and the report says by
how much.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import structlog

from lemix import Client, Future
from lemix.connection import Connection
from lemix.items import TrainItem
from lemix.reopening import until_open
from lemix.replies import Reply
from lemix_common.broker import Broker
from lemix_common.clock import Clock, wait_until
from lemix_common.errors import BrokerUnreachable, QueueFull, ShuttingDown, WaitTimeout
from lemix_common.ids import Version
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_studies.fingerprints import training_nodes, weights_sha256
from lemix_studies.history import History
from lemix_studies.measures import IdleTimes, ItemTimes, items_of
from lemix_studies.probing import probe_idle_times
from lemix_studies.spans import Span, SpanTail
from lemix_studies.workload import PlannedArrival

log = structlog.get_logger()
T = TypeVar("T")

NO_NEWS_S = 180.0
"""A cluster that says nothing for this long is given up; what has no end then is lost."""
PATIENCE_S = 600.0
"""How long a broker may be away, or a cluster closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedStep:
    """A line of steps.jsonl."""

    run_id: str
    step: int
    items: tuple[str, ...]
    weights_version: str
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a replay saw, uninterpreted."""

    arrivals: dict[str, PlannedArrival]
    items: list[ItemTimes]
    """In the trace's order."""
    answers: dict[str, Any]
    """Of the items that are done."""
    steps: list[CommittedStep]
    spans: list[Span]
    idle: IdleTimes
    nodes: int
    dead_lettered: int
    max_lateness_s: float
    weights_sha256: dict[str, str]
    policy: str = ""


@dataclass
class Replay:
    """One run of a workload over one client."""

    client: Client
    broker: Broker
    history: History
    arrivals: Sequence[PlannedArrival]
    prefix: str
    futures: dict[str, Future[Any]] = field(default_factory=dict)
    max_lateness_s: float = 0.0

    @property
    def clock(self) -> Clock:
        """The clock of all times in the report."""
        return self.broker.clock

    def submit_all(self) -> None:
        """Submit every item when it is due."""
        started = self.clock.now()
        for arrival in self.arrivals:
            wait_s = started + arrival.at_s - self.clock.now()
            if wait_s > 0:
                self.clock.sleep(wait_s)
            self.max_lateness_s = max(self.max_lateness_s, -wait_s)
            self._submit(arrival)

    def finish(self) -> None:
        """Flush, and wait for every end, as long as the cluster says something."""
        self._while_there_is_news(lambda: self._until_open(lambda: self.client.flush(NO_NEWS_S)))
        self._while_there_is_news(
            lambda: wait_until(
                lambda: all(future.done() for future in self.futures.values()),
                what="every item has ended",
                timeout_s=NO_NEWS_S,
            )
        )

    def answers(self) -> dict[str, Any]:
        """Of the items that are done."""
        ended = {item: future for item, future in self.futures.items() if future.done()}
        return {item: future.result(0) for item, future in ended.items() if future.exception(0) is None}

    def _while_there_is_news(self, attempt: Callable[[], object]) -> None:
        while True:
            seen = len(self.history.events)
            try:
                attempt()
            except (WaitTimeout, BrokerUnreachable, ShuttingDown) as error:
                log.warning("replay_waits", reason=str(error))
                if len(self.history.events) == seen:
                    return
            else:
                return

    def _until_open(self, attempt: Callable[[], T]) -> T:
        return until_open(attempt, clock=self.clock, patience_s=PATIENCE_S)

    def _submit(self, arrival: PlannedArrival) -> None:
        item = arrival.item(self.prefix)
        item_id = str(item.item_id)
        self.history.kinds[item_id] = arrival.kind
        self.history.record("submitted", item_id)
        while True:
            try:
                self.futures[item_id] = self._until_open(lambda: self.client.submit(item))
            except QueueFull as full:
                self.history.record("refused", item_id)
                if not isinstance(item, TrainItem):
                    return
                self.clock.sleep(full.retry_after_s)  # the weights depend on every example, in order
            except BrokerUnreachable as error:
                log.warning("submission_repeated", item=item_id, reason=str(error))
            else:
                self.history.record("accepted", item_id)
                return


def run_replay(
    connection: Connection,
    arrivals: Sequence[PlannedArrival],
    history_file: TextIO,
    *,
    prefix: str,
    data_dir: Path | None,
    on_reply: Callable[[Reply], None] | None = None,
) -> Outcome:
    """Measure the idle cluster, replay, flush, wait, and look at what is left behind.

    ``on_reply`` sees each reply, in the client's thread.
    """
    broker = connection.broker
    history = History(history_file, broker.clock.now)
    probes = History(io.StringIO(), broker.clock.now)
    tail = SpanTail(broker)

    def hear(reply: Reply) -> None:
        probes.hear(reply)
        history.hear(reply)
        if on_reply is not None:
            on_reply(reply)

    trained = training_nodes(broker)
    tail.start()
    try:
        with Client(connection=connection, on_reply=hear) as client:
            history.client = probes.client = client.name
            idle = probe_idle_times(client, arrivals, probes, tail, prefix=f"{prefix}-probe")
            replay = Replay(client, broker, history, arrivals, prefix)
            before = Training(broker, MAIN_RUN).state().committed
            dead_before = broker.client.xlen(broker.keys.dead_letters)
            replay.submit_all()
            replay.finish()
            answers = replay.answers()
    finally:
        tail.stop()
    settings = Cluster(broker).settings()
    items = items_of(history.events)
    note_predictions(broker, items.values())
    return Outcome(
        arrivals={str(arrival.item(prefix).item_id): arrival for arrival in arrivals},
        items=list(items.values()),
        answers=answers,
        steps=committed_steps(broker, after=before),
        spans=tail.spans,
        idle=idle,
        nodes=settings.nodes,
        dead_lettered=int(broker.again(lambda: broker.client.xlen(broker.keys.dead_letters)))
        - int(dead_before),
        max_lateness_s=replay.max_lateness_s,
        weights_sha256=weights_sha256(broker, data_dir, trained) if data_dir else {},
        policy=settings.policy,
    )


def note_predictions(broker: Broker, items: Iterable[ItemTimes]) -> None:
    """What was predicted when items were given to nodes, of those whose hashes are still there."""
    requests = [item for item in items if item.kind != "train"]
    hashes = broker.hashes(broker.keys.item(request.item) for request in requests)
    for request, fields in zip(requests, hashes, strict=True):
        if "predicted_end_at" in fields:
            request.predicted_end = float(fields["predicted_end_at"])


def committed_steps(broker: Broker, *, after: int) -> list[CommittedStep]:
    """The steps committed since ``after``, from their hashes."""
    run = Training(broker, MAIN_RUN).state()
    numbers = range(after + 1, run.committed + 1)
    hashes = broker.hashes(broker.keys.step(MAIN_RUN, number) for number in numbers)
    training = Training(broker, MAIN_RUN)
    return [
        CommittedStep(
            run_id=MAIN_RUN,
            step=number,
            items=training.step(number).items,
            weights_version=str(Version(run.lineage, number)),
            loss=float(fields["loss"]) if "loss" in fields else None,
        )
        for number, fields in zip(numbers, hashes, strict=True)
        if fields
    ]


def new_prefix() -> str:
    """What a replay on a cluster that others use calls its items."""
    return f"replay-{uuid.uuid4().hex[:8]}"
