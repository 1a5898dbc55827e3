"""Reads the cluster in numbers, at each scrape of a coordinator's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from lemix_common import metrics
from lemix_common.broker import Broker
from lemix_common.errors import BrokerError
from lemix_common.metrics import Sample
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.queues import read_queues
from lemix_common.store.training import run_state
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.metrics import ClusterFigures, cluster_samples, node_states
from lemix_coordinator.reader import node_view

log = structlog.get_logger()


@dataclass(frozen=True)
class CoordinatorMetrics:
    """What one coordinator shows: the whole cluster while it leads, else only that it stands by."""

    coordinator: Coordinator
    broker: Broker
    """A connection of its own with a patience of 0: a scrape doesn't wait for a broker that is away."""

    def read(self) -> Iterator[Sample]:
        """Now."""
        yield Sample(metrics.OUTAGES, self.coordinator.broker.outages)
        is_leading = self.coordinator.epoch > 0
        yield Sample(metrics.LEADING, is_leading)
        try:
            figures = read_figures(self.broker, self.coordinator.settings) if is_leading else None
            self.broker.again(self.broker.client.ping)
        except BrokerError as error:
            log.debug("figures_not_read", reason=str(error))
            yield Sample(metrics.BROKER_UP, 0)
            return
        yield Sample(metrics.BROKER_UP, 1)
        if figures is not None:
            yield from cluster_samples(figures)


def read_figures(broker: Broker, settings: ClusterSettings) -> ClusterFigures:
    """The cluster's hashes as numbers."""
    keys = broker.keys
    totals, run, *nodes = broker.hashes(
        [keys.totals, keys.run(MAIN_RUN), *map(keys.node, range(settings.nodes))]
    )
    workers = Cluster(broker).workers().values()
    alive = sum("alive" in fields for fields in workers)
    views = (node_view(index, fields, settings.stages) for index, fields in enumerate(nodes))
    return ClusterFigures(
        totals={name: float(value) for name, value in totals.items()},
        run=run_state(MAIN_RUN, run),
        queues=read_queues(broker, settings.nodes),
        nodes=node_states((all(stage.worker for stage in view.stages), view.is_ready) for view in views),
        workers_alive=alive,
        workers_silent=len(workers) - alive,
    )
