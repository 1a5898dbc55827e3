"""``python -m lemix_coordinator.operations``: composition root of an operations worker."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from lemix_common.broker import connect
from lemix_common.logs import configure_logs
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from lemix_coordinator.operations.app import ADVANCE, REMOVE, TRANSITION_S, make_app
from lemix_coordinator.operations.transitions import advance, prune_checkpoints, remove

log = structlog.get_logger()


def main() -> None:
    """Read the environment, connect, make transitions until SIGTERM."""
    environment = os.environ
    configure_logs(f"operations-{os.getpid()}", level=environment.get("LEMIX_LOG_LEVEL", "info"))
    url, cluster = environment["LEMIX_URL"], environment.get("LEMIX_CLUSTER", "lemix")
    data_dir = Path(environment.get("LEMIX_DATA_DIR", ".lemix")).absolute()
    broker = connect(url, cluster, patience_s=TRANSITION_S)
    versions, training = Versions(broker), Training(broker, MAIN_RUN)
    settings = Cluster(broker).settings()
    app = make_app(url, cluster)

    @app.task(name=ADVANCE)
    def advance_operation(operation: str) -> None:
        try:
            advance(versions, operation)
        except OSError as error:  # a full disk or a file that went away: the reconciler asks again
            log.error("transition_failed", operation=operation, reason=str(error))
        prune_checkpoints(
            data_dir / "checkpoints",
            keep=settings.keep_checkpoints,
            needed=training.state().checkpoint_directory,
        )

    @app.task(name=REMOVE)
    def remove_version(version: str, directory: str) -> None:
        remove(directory, root=data_dir / "versions")
        log.info("version_removed", version=version)

    app.worker_main(
        [
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
