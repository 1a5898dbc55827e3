"""Waiting until the served weights are new enough: for everything submitted so far, or for a version."""

from __future__ import annotations

import math
from collections.abc import Callable

from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError, ShuttingDown
from lemix_common.ids import Version
from lemix_common.store.cluster import Cluster
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions

_POLL_S = 0.05


def flush(broker: Broker, run: str, *, timeout_s: float | None) -> str:
    """Have a partial step planned, wait until all planned steps are served; returns the served version."""
    training = Training(broker, run)
    planned, newest = training.flush()

    def wait_for(predicate: Callable[[], bool], what: str) -> None:
        wait_until(
            lambda: predicate() or _stops(broker),
            what=what,
            timeout_s=math.inf if timeout_s is None else timeout_s,
            interval_s=_POLL_S,
        )

    if newest:
        wait_for(lambda: _is_planned(training, newest), "the submitted examples are planned")
        planned = training.state().planned
    wait_for(lambda: _is_decided(training, planned), f"step {planned} is served")
    if training.state().published < planned:
        (judged,) = Versions(broker).published(1)
        raise ClusterError(
            f"version {judged['version']} was held back: {judged.get('reason')}; it is trained on"
        )
    return Versions(broker).live()["served"]


def wait_for_version(broker: Broker, version: Version, *, timeout_s: float | None) -> str:
    """Wait until ``version`` or a newer one is served; returns the served one."""
    versions = Versions(broker)
    wait_until(
        lambda: Version.parse(versions.live()["served"]) >= version or _stops(broker),
        what=f"version {version} is served",
        timeout_s=math.inf if timeout_s is None else timeout_s,
        interval_s=_POLL_S,
    )
    return versions.live()["served"]


def _is_decided(training: Training, step: int) -> bool:
    run = training.state()
    return max(run.published, run.held_back) >= step


def _is_planned(training: Training, example: str) -> bool:
    oldest = training.queued_examples(1)
    return not oldest or _order(oldest[0].id) > _order(example)


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


def _stops(broker: Broker) -> bool:
    """Never True: a cluster that stops will serve nothing new, so waiting for it ends as an error."""
    state = Cluster(broker).state()
    if state.get("state") != "running":
        raise ShuttingDown(
            "the cluster is stopping, so this wait can't end; what was submitted is kept until it goes on"
        )
    return False
