"""The sha256 of each node's training weights, by an operation of the cluster that writes, hashes and forgets them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import structlog

from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.errors import WaitTimeout
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.versions import ENDED_STATES, Versions

log = structlog.get_logger()

_TIMEOUT_S = 60.0
_TRIES = 3


def weights_sha256(broker: Broker, data_dir: Path) -> dict[str, str]:
    """Hash by node, of those that hold the training state in all stages; a node that can't say is left out."""
    settings = Cluster(broker).settings()
    nodes = Cluster(broker).nodes(settings.nodes)
    hashes = {
        str(node): _fingerprint(broker, data_dir, node, settings.stages)
        for node, fields in enumerate(nodes)
        if _trains(fields, settings.stages)
    }
    return {node: sha256 for node, sha256 in hashes.items() if sha256 is not None}


def _trains(node: Mapping[str, str], stages: int) -> bool:
    return all(f"training:{stage}" in node for stage in range(stages))


def _fingerprint(broker: Broker, data_dir: Path, node: int, stages: int) -> str | None:
    """A node's hash; tried again if another node had to write in its place."""
    versions = Versions(broker)
    writers = [node] * stages
    for _ in range(_TRIES):
        operation = f"fingerprint-{uuid.uuid4().hex}"
        epoch = int(Cluster(broker).nodes(node + 1)[node]["epoch"])
        versions.open(
            operation,
            "fingerprint",
            run=MAIN_RUN,
            root=str(data_dir / "fingerprints"),
            writers=writers,
            epochs=[epoch] * stages,
        )
        try:
            wait_until(
                lambda name=operation: versions.operation(name).get("state") in ENDED_STATES,  # type: ignore[misc]
                what=f"the weights of node {node} are hashed",
                timeout_s=_TIMEOUT_S,
            )
        except WaitTimeout as error:
            log.warning("fingerprint_failed", node=node, reason=str(error))
            return None
        ended = versions.operation(operation)
        if ended["state"] == "sealed" and ended["writers"] == str(writers):
            return ended["sha256"]
        log.warning("fingerprint_repeated", node=node, state=ended["state"], reason=ended.get("reason"))
    return None
