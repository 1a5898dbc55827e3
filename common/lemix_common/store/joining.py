"""How a process joins its cluster: it waits for the broker, then for the cluster, and says what it waits for.

Processes may start in any order, on machines or in containers that know nothing of each other. What can't get better by
waiting (a wrong password, a broker that is too old) is an error at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from lemix_common.broker import Broker, connect
from lemix_common.errors import BrokerUnreachable, ClusterError
from lemix_common.store.cluster import Cluster

log = structlog.get_logger()
T = TypeVar("T")

_ASK_AGAIN_S = 0.5
_SAY_AGAIN_S = 10.0


def join_cluster(url: str, cluster: str, stop: threading.Event, *, patience_s: float = 60.0) -> Broker | None:
    """The cluster's broker, once both are there; None if told to stop before."""
    broker = await_broker(url, cluster, stop, patience_s=patience_s)
    if broker is None or _first(Cluster(broker).settings, stop) is None:
        return None
    return broker


def await_broker(url: str, cluster: str, stop: threading.Event, *, patience_s: float = 60.0) -> Broker | None:
    """The broker, once it answers; None if told to stop before."""
    return _first(lambda: connect(url, cluster, patience_s=patience_s), stop)


def _first(attempt: Callable[[], T], stop: threading.Event) -> T | None:
    said_at = float("-inf")
    while not stop.is_set():
        try:
            return attempt()
        except (BrokerUnreachable, ClusterError) as error:
            if time.monotonic() - said_at >= _SAY_AGAIN_S:
                said_at = time.monotonic()
                log.info("waiting", reason=str(error))
        stop.wait(_ASK_AGAIN_S)
    return None
