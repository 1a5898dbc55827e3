"""The training tax while it runs: what an item waited is counted with its response, when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from integration.scripted_worker import BYTES_TOKENIZER, MODEL
from lemix_common.broker import Broker, Entry
from lemix_common.clock import ManualClock
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster
from lemix_common.store.items import STAGE_0, Items, StartedItem
from lemix_stage_worker.reporter import Reporter, Span


@dataclass
class Served:
    """An item of one node, by a clock that stands at 100 s when it is submitted."""

    broker: Broker
    clock: ManualClock
    started: StartedItem

    def waits(self, seconds: float) -> None:
        """A stage's worker reports a step that waited so long behind training."""
        reporter = Reporter("w", self.broker)
        now = self.clock.now()
        about = {"node": 0, "stage": 0, "worker": "w", "cat": "decode", "version": "0.0"}
        reporter.start()
        item, waits = self.started.item, {self.started.item: seconds}
        span = Span(**about, item=item, start=now - 0.01, end=now, blocked_s=seconds, waits=waits)  # type: ignore[arg-type]
        reporter.span(span)
        reporter.close()

    def ends(self, *, as_done: bool = True) -> None:
        """Its stage 0 completes it, or lets it fail."""
        items = Items(self.broker)
        call = items.complete(self.started, 0, {}) if as_done else items.fail(self.started, 0, "no reason")
        self.broker.call_many([call])

    def totals(self) -> dict[str, float]:
        """The tax and its two sums."""
        counted = self.broker.hash(self.broker.keys.totals)
        return {name: float(counted.get(name, 0)) for name in ("training_tax", "blocked_s", "response_s")}


NOTHING = {"training_tax": 0.0, "blocked_s": 0.0, "response_s": 0.0}


@pytest.fixture
def served(broker: Broker) -> Served:
    """A request that its node has begun."""
    clock = ManualClock(100.0)
    broker.clock = clock
    cluster, items = Cluster(broker), Items(broker)
    cluster.create(ClusterSettings(model="m"), MODEL, BYTES_TOKENIZER)
    leader = cluster.lead("me", expiry_s=60)
    assert leader is not None
    items.submit("a", {"kind": "generate", "tokens": 2, "submitted_at": clock.now()}, {"prompt": [1, 2]})
    (entry,) = items.submitted("coordinator", count=1, pending=False)
    broker.call_many([items.dispatch(leader, entry, 0)])
    entries: list[Entry] = broker.read_group(broker.keys.work(0), STAGE_0, "w", block_s=0.001, count=1)
    ((started,), _) = items.start(0, "w", entries)
    return Served(broker, clock, started)


def test_a_running_items_wait_is_no_tax_yet(served: Served) -> None:
    """Its response isn't known, so its wait would stand alone: a tax without bounds, which nobody pays."""
    served.waits(3.0)
    assert served.totals() == NOTHING
    served.clock.sleep(5.0)
    served.ends()
    assert served.totals() == {"training_tax": 1.5, "blocked_s": 3.0, "response_s": 5.0}


def test_a_wait_that_is_reported_late_counts(served: Served) -> None:
    """Other stages' workers report a moment after stage 0 has ended the item."""
    served.clock.sleep(5.0)
    served.ends()
    assert served.totals() == NOTHING | {"response_s": 5.0}
    served.waits(0.75)
    served.waits(0.25)
    assert served.totals() == {"training_tax": 0.25, "blocked_s": 1.0, "response_s": 5.0}


def test_an_item_without_an_answer_pays_no_tax(served: Served) -> None:
    """A failed item has no response, so neither its wait counts."""
    served.waits(1.0)
    served.clock.sleep(5.0)
    served.ends(as_done=False)
    served.waits(1.0)
    assert served.totals() == NOTHING


def test_a_wait_is_kept_with_its_item(served: Served) -> None:
    """`lemix item` shows what training cost this one; an item that has expired doesn't come back by it."""
    served.waits(0.5)
    served.waits(0.25)
    assert float(Items(served.broker).get("a")["blocked_s"]) == 0.75
    served.broker.client.delete(served.broker.keys.item("a"))
    served.waits(0.5)
    assert not served.broker.client.exists(served.broker.keys.item("a"))
