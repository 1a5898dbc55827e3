"""``python -m lemix_coordinator.operations``: composition root of an operations worker."""

from __future__ import annotations

import argparse
import os
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import structlog

from lemix_common.logs import configure_logs
from lemix_common.metrics import OUTAGES, TRANSITIONS, Sample, metrics_address
from lemix_common.metrics_page import metrics_page
from lemix_common.sign_of_life import SignOfLife
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.joining import join_cluster
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.versions import Versions
from lemix_coordinator.operations.app import ADVANCE, REMOVE, TRANSITION_S, make_app
from lemix_coordinator.operations.liveness import show_life
from lemix_coordinator.operations.transitions import advance, prune_checkpoints, remove

log = structlog.get_logger()


def main() -> None:
    """Read the environment, wait for the cluster, make transitions until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m lemix_coordinator.operations")
    parser.add_argument("--alive-file", type=Path, help="touched as long as the operations worker is well")
    options = parser.parse_args()
    environment = os.environ
    name = f"operations-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    configure_logs(name, level=environment.get("LEMIX_LOG_LEVEL", "info"))
    url, cluster = environment["LEMIX_URL"], environment.get("LEMIX_CLUSTER", "lemix")
    data_dir = Path(environment.get("LEMIX_DATA_DIR", ".lemix")).absolute()
    broker = join_cluster(url, cluster, threading.Event(), patience_s=TRANSITION_S)
    assert broker is not None, "until Celery handles SIGTERM, it ends the process"
    versions, rollbacks = Versions(broker), Rollbacks(broker, MAIN_RUN)
    settings = Cluster(broker).settings()
    app = make_app(url, cluster)
    show_life(app, SignOfLife(options.alive_file))
    outcomes = Counter({"made": 0, "failed": 0})

    def samples() -> Iterator[Sample]:
        yield Sample(OUTAGES, broker.outages)
        yield from (Sample(TRANSITIONS, count, (outcome,)) for outcome, count in outcomes.items())

    @app.task(name=ADVANCE)
    def advance_operation(operation: str) -> None:
        try:
            advance(versions, operation)
            outcomes["made"] += 1
        except OSError as error:  # a full disk or a file that went away: the reconciler asks again
            outcomes["failed"] += 1
            log.error("transition_failed", operation=operation, reason=str(error))
        prune_checkpoints(
            rollbacks, data_dir / "checkpoints", keep=settings.keep_checkpoints, now=broker.clock.now()
        )

    @app.task(name=REMOVE)
    def remove_version(version: str, directory: str) -> None:
        remove(directory, root=data_dir / "versions")
        log.info("version_removed", version=version)

    with metrics_page(
        samples,
        process=name,
        role="operations",
        address=metrics_address(environment),
        cluster=Cluster(replace(broker, patience_s=0)),
    ):
        app.worker_main(
            [
                "--quiet",  # its banner is no structured log
                "worker",
                "--pool=solo",
                "--loglevel=WARNING",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
            ]
        )


if __name__ == "__main__":
    main()
