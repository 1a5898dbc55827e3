"""The sha256 of each node's weights.

Of what it trains, by an operation of the cluster that writes, hashes and forgets it; of what it serves, where it only
serves.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.errors import WaitTimeout
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import ENDED_STATES, Versions

log = structlog.get_logger()

_TIMEOUT_S = 60.0
_TRIES = 3
_POLL_S = 0.05


def training_nodes(broker: Broker) -> list[int]:
    """The nodes that hold the training state in all their stages."""
    settings = Cluster(broker).settings()
    nodes = Cluster(broker).nodes(settings.nodes)
    return [node for node, fields in enumerate(nodes) if _training_steps(fields, settings.stages) is not None]


def weights_sha256(broker: Broker, data_dir: Path, nodes: Sequence[int]) -> dict[str, str]:
    """Hash by node: of those that train after the step committed last, of the others of the served version.

    A node that can't say in time is left out.
    """
    settings = Cluster(broker).settings()
    versions = Versions(broker)
    served = versions.version(versions.live()["served"]).get("sha256")
    hashes = {str(node): served for node in settings.serving_nodes if node not in settings.training_nodes}
    hashes |= {str(node): _fingerprint(broker, data_dir, node, settings.stages) for node in nodes}
    return {node: sha256 for node, sha256 in hashes.items() if sha256 is not None}


def _training_steps(node: Mapping[str, str], stages: int) -> set[str] | None:
    """The steps that the stages' training states are after; None if a stage has none."""
    steps = {node.get(f"training:{stage}") for stage in range(stages)}
    return None if None in steps else {str(step) for step in steps}


def _fingerprint(broker: Broker, data_dir: Path, node: int, stages: int) -> str | None:
    """A node's hash; tried again if another node had to write in its place."""
    try:
        for _ in range(_TRIES):
            _wait(lambda: _is_up_to_date(broker, node, stages), f"node {node} has the newest weights")
            ended = _write_and_hash(broker, data_dir, node, stages)
            if ended["state"] == "sealed" and ended["writers"] == str([node] * stages):
                return ended["sha256"]
            log.warning("fingerprint_repeated", node=node, state=ended["state"], reason=ended.get("reason"))
    except WaitTimeout as error:
        log.warning("fingerprint_failed", node=node, reason=str(error))
    return None


def _is_up_to_date(broker: Broker, node: int, stages: int) -> bool:
    """A lost stage may be on its way back."""
    committed = Training(broker, MAIN_RUN).state().committed
    return _training_steps(Cluster(broker).nodes(node + 1)[node], stages) == {str(committed)}


def _write_and_hash(broker: Broker, data_dir: Path, node: int, stages: int) -> dict[str, str]:
    """The operation's record when it has ended; what it wrote is removed, its hash is all that is wanted."""
    versions, operation = Versions(broker), f"fingerprint-{uuid.uuid4().hex}"
    versions.open(
        operation,
        "fingerprint",
        run=MAIN_RUN,
        root=str(data_dir / "fingerprints"),
        writers=[node] * stages,
        epochs=[int(Cluster(broker).nodes(node + 1)[node]["epoch"])] * stages,
    )
    _wait(
        lambda: versions.operation(operation).get("state") in ENDED_STATES,
        f"the weights of node {node} are hashed",
    )
    ended = versions.operation(operation)
    shutil.rmtree(ended.get("directory", ""), ignore_errors=True)
    return ended


def _wait(predicate: Callable[[], bool], what: str) -> None:
    wait_until(predicate, what=what, timeout_s=_TIMEOUT_S, interval_s=_POLL_S)
