"""``python -m lemix_coordinator``: composition root of the coordinator process."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from pathlib import Path

import structlog

from lemix_common.broker import connect
from lemix_common.logs import configure_logs
from lemix_common.store.cluster import Cluster
from lemix_coordinator.coordinator import Coordinator
from lemix_coordinator.operations.app import CeleryTransitions, make_app


def main() -> None:
    """Read the environment, connect, lead or stand by until SIGTERM."""
    environment = os.environ
    name = f"coordinator-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    configure_logs(name, level=environment.get("LEMIX_LOG_LEVEL", "info"))
    url, cluster = environment["LEMIX_URL"], environment.get("LEMIX_CLUSTER", "lemix")
    data_dir = Path(environment.get("LEMIX_DATA_DIR", ".lemix")).absolute()
    broker = connect(url, cluster)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    coordinator = Coordinator(
        name=name,
        broker=broker,
        settings=Cluster(broker).settings(),
        data_dir=data_dir,
        transitions=CeleryTransitions(make_app(url, cluster)),
    )
    coordinator.run(stop)
    structlog.get_logger().info("stopped")


if __name__ == "__main__":
    main()
