"""The table of metrics, and the pure functions that fill it."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lemix_common import metrics
from lemix_common.errors import SettingsError
from lemix_common.metrics import METRICS, Metric, MetricsAddress, Sample, metrics_address
from lemix_common.metrics_page import families
from lemix_common.store.queues import Queue
from lemix_common.store.training import run_state
from lemix_coordinator.metrics import ClusterFigures, cluster_samples, node_states
from lemix_stage_worker.metrics import StageTimes


def test_every_metric_is_in_the_table() -> None:
    """The page of metrics is drawn from the table, so a metric beside it would be undocumented."""
    defined = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert defined == list(METRICS)


def test_names_follow_prometheus() -> None:
    """Our prefix, counters end in _total, each name once, each with a sentence."""
    assert max(Counter(metric.name for metric in METRICS).values()) == 1
    for metric in METRICS:
        assert re.fullmatch(r"lemix_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.meaning.endswith(".")


def test_samples_are_read_back_by_prometheus() -> None:
    """Samples of one metric become one family, whatever order they come in; labels keep their order."""
    shown = page(
        Sample(metrics.QUEUE_DEPTH, 3, ("work:0",)),
        Sample(metrics.BUSY_TIME, 1.5, (0, 1, "decode")),
        Sample(metrics.QUEUE_DEPTH, 4, ("examples",)),
    )
    depth, busy = text_string_to_metric_families(shown)
    assert (depth.name, depth.type, busy.name, busy.type) == (
        "lemix_queue_depth",
        "gauge",
        "lemix_stage_busy_seconds",
        "counter",
    )
    assert [(sample.labels, sample.value) for sample in depth.samples] == [
        ({"queue": "work:0"}, 3.0),
        ({"queue": "examples"}, 4.0),
    ]
    assert busy.samples[0].labels == {"node": "0", "stage": "1", "kind": "decode"}


def test_the_cluster_in_numbers() -> None:
    """Totals, queues, steps, nodes and workers as the hashes say; what never happened is 0."""
    figures = ClusterFigures(
        totals={"submitted": 7, "done": 5, "open": 2, "training_tax": 0.25, "blocked_s": 1, "response_s": 5},
        run=run_state("main", {"planned": "4", "committed": "3", "published": "2", "checkpoint": "1"}),
        queues={"submissions": Queue(depth=2, pending=1, oldest_age_s=0.5)},
        nodes=node_states([(True, True), (True, False), (False, False)]),
        workers_alive=5,
        workers_silent=1,
    )
    shown = {(sample.metric.name, sample.labels): sample.value for sample in cluster_samples(figures)}
    assert shown["lemix_items_total", ("done",)] == 5
    assert shown["lemix_items_total", ("failed",)] == 0
    assert shown["lemix_items_open", ()] == 2
    assert shown["lemix_queue_depth", ("submissions",)] == 2
    assert shown["lemix_queue_pending", ("submissions",)] == 1
    assert shown["lemix_queue_oldest_age_seconds", ("submissions",)] == 0.5
    steps = [shown[f"lemix_step_{name}", ("main",)] for name in STEPS]
    assert steps == [4, 3, 2, 1]
    assert shown["lemix_training_tax_ratio", ()] == 0.25
    assert [shown["lemix_nodes", (state,)] for state in ("ready", "starting", "unplaced")] == [1, 1, 1]
    assert [shown["lemix_workers", (state,)] for state in ("alive", "silent")] == [5, 1]


STEPS = ("planned", "committed", "published", "checkpointed")


def test_a_stages_times_add_up() -> None:
    """By kind of work; a hosted stage that did nothing shows zeros, so that a rate can be taken from its start."""
    times = StageTimes()
    for busy_s in (0.25, 0.5):
        times.add(0, 1, "decode", busy_s=busy_s, blocked_s=0.125)
    shown = {(s.metric.name, s.labels): s.value for s in times.samples([(0, 1), (2, 0)])}
    assert shown["lemix_stage_busy_seconds_total", (0, 1, "decode")] == 0.75
    assert shown["lemix_stage_blocked_seconds_total", (0, 1)] == 0.25
    assert shown["lemix_stage_busy_seconds_total", (2, 0, "optimizer")] == 0
    assert shown["lemix_stage_blocked_seconds_total", (2, 0)] == 0


def test_the_environment_says_where() -> None:
    """This machine and any free port, unless it says otherwise; what is no port is refused."""
    assert metrics_address({}) == MetricsAddress("127.0.0.1", 0)
    given = {"LEMIX_METRICS_HOST": "0.0.0.0", "LEMIX_METRICS_PORT": "9400"}
    assert metrics_address(given) == MetricsAddress("0.0.0.0", 9400)
    for text in ("-1", "65536", "http"):
        with pytest.raises(SettingsError, match="must be a port"):
            metrics_address({"LEMIX_METRICS_PORT": text})


class Fixed(Collector):
    """A collector of given samples."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def collect(self) -> list[Family]:
        return families(self.samples)


def page(*samples: Sample) -> str:
    """What Prometheus is shown of these."""
    registry = CollectorRegistry()
    registry.register(Fixed(*samples))
    return generate_latest(registry).decode()
