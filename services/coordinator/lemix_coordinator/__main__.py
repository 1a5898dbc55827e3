"""``python -m lemix_coordinator``: composition root of the coordinator process."""

from __future__ import annotations

import argparse
import os
import signal
import uuid
from dataclasses import replace
from pathlib import Path

import structlog

from lemix_common.logs import configure_logs
from lemix_common.metrics import metrics_address
from lemix_common.metrics_page import metrics_page
from lemix_common.sign_of_life import SignOfLife
from lemix_common.store.cluster import Cluster
from lemix_common.store.joining import join_cluster
from lemix_coordinator.closing import StopRequests, close_when_asked
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.figures import CoordinatorMetrics
from lemix_coordinator.operations.app import CeleryTransitions, make_app


def main() -> None:
    """Read the environment, wait for the cluster, lead or stand by until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m lemix_coordinator")
    parser.add_argument(
        "--last-checkpoint",
        action="store_true",
        help="at SIGTERM the leader closes the cluster: it accepts no more and makes a last checkpoint first",
    )
    parser.add_argument("--alive-file", type=Path, help="touched as long as the coordinator is well")
    options = parser.parse_args()
    environment = os.environ
    name = f"coordinator-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    configure_logs(name, level=environment.get("LEMIX_LOG_LEVEL", "info"))
    url, cluster = environment["LEMIX_URL"], environment.get("LEMIX_CLUSTER", "lemix")
    data_dir = Path(environment.get("LEMIX_DATA_DIR", ".lemix")).absolute()
    requests = StopRequests()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, requests.note)
    broker = join_cluster(url, cluster, requests.asked)
    if broker is None:
        return
    hasty = replace(broker, patience_s=0)
    coordinator = Coordinator(
        name=name,
        broker=broker,
        settings=Cluster(broker).settings(),
        data_dir=data_dir,
        transitions=CeleryTransitions(make_app(url, cluster)),
        sign_of_life=SignOfLife(options.alive_file),
    )
    stop = close_when_asked(name, requests, hasty, data_dir) if options.last_checkpoint else requests.asked
    with metrics_page(
        CoordinatorMetrics(coordinator, hasty).read,
        process=name,
        role="coordinator",
        address=metrics_address(environment),
        cluster=Cluster(hasty),
    ):
        coordinator.run(stop)
    structlog.get_logger().info("stopped")


if __name__ == "__main__":
    main()
