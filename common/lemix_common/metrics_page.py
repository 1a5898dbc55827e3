"""Serves a process's metrics to Prometheus, and tells the cluster where."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version

import structlog
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from lemix_common.errors import BrokerError
from lemix_common.metrics import BUILD, Metric, MetricsAddress, Sample
from lemix_common.store.cluster import METRICS_EXPIRY_S, Cluster

log = structlog.get_logger()

Read = Callable[[], Iterable[Sample]]


@dataclass(frozen=True)
class _Page(Collector):
    """What is asked for at each scrape."""

    read: Read

    def collect(self) -> Iterator[Family]:
        """The samples by metric, as Prometheus wants them."""
        yield from families(self.read())


def families(samples: Iterable[Sample]) -> list[Family]:
    """Samples of one metric together, in the order they first came."""
    by_name: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for sample in samples:
        family = by_name.get(sample.metric.name) or _family(sample.metric)
        by_name[sample.metric.name] = family
        family.add_metric([str(label) for label in sample.labels], sample.value)
    return list(by_name.values())


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name, metric.meaning, labels=metric.labels)


@contextmanager
def metrics_page(
    read: Read, *, process: str, role: str, address: MetricsAddress, cluster: Cluster
) -> Iterator[str]:
    """Serve and announce a process's metrics, with its own memory, time and files, for a ``with`` block.

    Yields the page's URL, '' if its port is taken. ``cluster``: with a patience of 0, nobody waits for announcements.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    about = (version("lemix"), role)
    registry.register(_Page(lambda: [Sample(BUILD, 1, about), *read()]))
    try:
        server, thread = start_http_server(address.port, addr=address.host, registry=registry)
    except OSError as error:
        log.error("metrics_not_served", host=address.host, port=address.port, reason=str(error))
        server = None
    if server is None:  # nobody can look, but the work goes on
        yield ""
        return
    shown_at = f"http://{_reachable(address.host)}:{server.server_port}/metrics"
    stop = threading.Event()
    announcing = threading.Thread(target=_announce, args=(cluster, process, shown_at, stop), name="metrics")
    announcing.daemon = True
    announcing.start()
    try:
        yield shown_at
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
        announcing.join()


def _announce(cluster: Cluster, process: str, url: str, stop: threading.Event) -> None:
    """Say where the page is, again and again; what a killed process said is forgotten after a while."""
    is_last = False
    while not is_last:
        with suppress(BrokerError):  # it is being restarted: said again soon
            cluster.announce_metrics(process, url)
        is_last = stop.wait(METRICS_EXPIRY_S / 3)
    with suppress(BrokerError):
        cluster.withdraw_metrics(process, url)


def _reachable(host: str) -> str:
    """An address that listens on every network is announced under the machine's name."""
    return os.uname().nodename if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compared, not bound
