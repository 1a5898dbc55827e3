"""A cluster as the bench `tax` has it: it serves and trains, each when asked to, and its spans say what it did."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from lemix import Client
from lemix.running import running_cluster
from lemix_benchmarks.backlog import Backlog
from lemix_benchmarks.batches import made_up_batches
from lemix_benchmarks.client_load import open_loop, streamed
from lemix_benchmarks.decoding import Answer, Request, percentile
from lemix_benchmarks.model import VOCABULARY
from lemix_common.broker import Broker, connect
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.training import Training
from lemix_studies.intervals import Interval
from lemix_studies.spans import Span, SpanTail

EXAMPLE_TOKENS: Final = 64
_SERVING: Final = frozenset({"prefill", "decode"})
_REPORTED_S: Final = 1.0
"""By then the workers have told what they did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case in one round; what it doesn't have is empty or 0."""

    ttfts_s: tuple[float, ...] = ()
    itls_s: tuple[float, ...] = ()
    examples_per_second: float = 0.0
    serving_share: float = 0.0
    """Of the stages' time, what serving took."""
    blocked_s: tuple[float, ...] = ()
    """Of each serving step."""
    backwards_s: tuple[float, ...] = ()
    """Of each example, on the first stage."""

    def figure(self, name: str) -> float:
        """`ttft_p95` or the like, in seconds."""
        kind, percent = name.split("_p")
        return percentile(self.ttfts_s if kind == "ttft" else self.itls_s, int(percent))

    @property
    def blocked_p99_s(self) -> float:
        """Over the serving steps."""
        return percentile(self.blocked_s, 99) if self.blocked_s else 0.0

    def to_fields(self) -> dict[str, float]:
        """What a row says beside its samples, of one round."""
        fields: dict[str, float] = {}
        if self.ttfts_s:
            names = ("ttft_p50", "ttft_p95", "ttft_p99", "itl_p50", "itl_p95", "itl_p99")
            fields |= {f"{name}_s": self.figure(name) for name in names}
            fields |= {
                "requests": len(self.ttfts_s),
                "serving_share": self.serving_share,
                "blocked_p99_s": self.blocked_p99_s,
            }
        if self.examples_per_second:
            fields["examples_per_second"] = self.examples_per_second
        return fields


def measured(spans: Sequence[Span], during: Interval, answers: Sequence[Answer], *, stages: int) -> Measured:
    """What the stages did within that time (the broker's clock), and what the requests saw."""
    began, ended = during
    within = [span for span in spans if began <= span["start"] and span["end"] <= ended]
    serving = [span for span in within if span["cat"] in _SERVING]
    backwards: dict[str, float] = {}
    for span in within:
        if span["cat"] == "training_backward" and span["stage"] == 0:  # in pieces, where it gave way
            backwards[span["item"]] = backwards.get(span["item"], 0.0) + span["end"] - span["start"]
    return Measured(
        ttfts_s=tuple(answer.ttft_s for answer in answers),
        itls_s=tuple(itl for answer in answers for itl in answer.itls_s),
        examples_per_second=len(backwards) / (ended - began),
        serving_share=sum(span["end"] - span["start"] for span in serving) / (stages * (ended - began)),
        blocked_s=tuple(span["blocked_s"] for span in serving),
        backwards_s=tuple(backwards.values()),
    )


@dataclass(eq=False)
class Tenants:
    """A cluster that serves and trains, each for as long as it is asked to."""

    client: Client
    broker: Broker
    tail: SpanTail
    backlog: Backlog
    stages: int

    def serve(self, requests: Sequence[Request], arrivals: Sequence[float], *, trains: bool) -> Measured:
        """These requests at these moments, with or without training beside them."""
        with self.backlog if trains else nullcontext():
            began = self.broker.clock.now()
            answered = open_loop(partial(streamed, self.client), requests, arrivals)
            ended = min(began + arrivals[-1], self.broker.clock.now())
        return self._measured((began, ended), answered.answers)

    def train(self, seconds: float) -> Measured:
        """Nothing else for so long."""
        with self.backlog:
            began = self.broker.clock.now()
            time.sleep(seconds)
            ended = self.broker.clock.now()
        return self._measured((began, ended), ())

    def _measured(self, during: Interval, answers: Sequence[Answer]) -> Measured:
        time.sleep(_REPORTED_S)
        return measured(list(self.tail.spans), during, answers, stages=self.stages)


@contextmanager
def running_tenants(settings: ClusterSettings, directory: Path, seed: int) -> Iterator[Tenants]:
    """A cluster of these settings; a step that is submitted has as many examples as the settings say."""
    examples = (
        batch[0] for batch in made_up_batches(seed, examples=1, tokens=EXAMPLE_TOKENS, vocabulary=VOCABULARY)
    )
    with running_cluster(settings, data_dir=directory) as url, Client(url) as client:
        broker = connect(url)
        tail = SpanTail(broker)
        tail.start()
        try:
            backlog = Backlog(
                client,
                Training(broker, MAIN_RUN),
                lambda: tuple(islice(examples, settings.step_examples)),
            )
            yield Tenants(client, broker, tail, backlog, settings.stages)
        finally:
            tail.stop()
