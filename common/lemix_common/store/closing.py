"""The end of a cluster's life: no new work, and what was learned is made durable as one last checkpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import structlog

from lemix_common.broker import Broker
from lemix_common.errors import BrokerError
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import ENDED_STATES, Versions

log = structlog.get_logger()

CHECKPOINT_TIMEOUT_S = 60.0
_TICK_S = 0.05


def last_checkpoint(broker: Broker, checkpoints: Path, go_on: Callable[[], bool]) -> None:
    """Stop accepting and write the committed steps, unless the newest checkpoint has them all.

    ``go_on`` is asked all along; its False gives up, as does time. A broker that is away may come back.
    """
    deadline = time.monotonic() + CHECKPOINT_TIMEOUT_S
    versions, operation = Versions(broker), f"checkpoint-{uuid.uuid4().hex}"
    is_open, state = False, ""
    while go_on() and time.monotonic() < deadline and state not in ENDED_STATES:
        try:
            if not is_open:
                is_open = _open(broker, versions, operation, checkpoints)
                if not is_open:
                    return
            state = versions.operation(operation).get("state", "")
        except BrokerError:
            pass  # it is being restarted
        time.sleep(_TICK_S)
    log.info("last_checkpoint", operation=operation, state=state or "skipped")


def _open(broker: Broker, versions: Versions, operation: str, checkpoints: Path) -> bool:
    Cluster(broker).stop_accepting()
    run = Training(broker, MAIN_RUN).state()
    if run.committed <= run.checkpoint:
        return False
    versions.open(operation, "checkpoint", run=MAIN_RUN, optimizer=True, root=str(checkpoints))
    return True
