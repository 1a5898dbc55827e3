"""Reads the cluster's hashes into a `ClusterView`. The only code of the coordinator that looks at field names."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import ENDED
from lemix_common.store.training import run_state
from lemix_common.store.versions import Versions
from lemix_coordinator.drains import Drains
from lemix_coordinator.view import ClusterView, NodeView, OperationView, StageView, WorkerView

TAX_WINDOW_S = 5.0


@dataclass
class Reader:
    """Turns Redis into views; remembers only since when something has been missing."""

    cluster: Cluster
    versions: Versions
    _empty_since: dict[tuple[int, int], float] = field(default_factory=dict)
    _waits: deque[tuple[float, float, float]] = field(default_factory=deque)
    """When, and the sums by then: what ended requests waited behind training, and what they took."""
    _drains: Drains = field(default_factory=Drains)

    def view(
        self,
        settings: ClusterSettings,
        *,
        now: float,
        trust_heartbeats: bool,
    ) -> ClusterView:
        """The cluster now. Heartbeats aren't trusted right after a start or an outage of the broker.

        Run, nodes and versions are read at one moment: a commit between them would look like a node that fell behind.
        Operations are read before them: one that ends in between is taken for open, not for one that is still due.
        """
        broker = self.cluster.broker
        keys = broker.keys
        operations = self.versions.in_progress()
        state, run, live, in_flight, totals, *node_fields = broker.hashes(
            [
                keys.cluster_state,
                keys.run(MAIN_RUN),
                keys.versions,
                keys.versions_in_flight,
                keys.totals,
                *map(keys.node, range(settings.nodes)),
            ]
        )
        nodes = tuple(node_view(index, fields, settings.stages) for index, fields in enumerate(node_fields))
        workers = worker_views(self.cluster.workers(), trust_heartbeats=trust_heartbeats)
        self._note_empty(nodes, workers, now)
        preparing = self.versions.version(live["preparing"]) if live.get("preparing") else {}
        draining = live.get("draining", "")
        served, drained = map(self.versions.version, (live["served"], draining)) if draining else ({}, {})
        self._drains.look(in_flight, draining, now, num_stages=settings.nodes * settings.stages)
        return ClusterView(
            settings=settings,
            is_stopping=state.get("state") != "running",
            workers=workers,
            nodes=nodes,
            run=run_state(MAIN_RUN, run),
            served=live.get("served", ""),
            draining=draining,
            draining_in_flight=int(in_flight.get(draining, 0)),
            draining_for_s=now - float(served.get("published_at", now)),
            is_draining_cleared="cleared_at" in drained,
            divided_s=self._drains.divided_s,
            undivided_s=self._drains.undivided_s,
            operations=tuple(
                operation_view(name, fields, preparing, nodes, items_left=self._items_left(fields))
                for name, fields in operations.items()
                if fields.get("run") == MAIN_RUN
            ),
            recent_tax=self._recent_tax(totals, now),
            empty_for_s={position: now - since for position, since in self._empty_since.items()},
        )

    def _items_left(self, operation: Mapping[str, str]) -> int:
        """How many of the items that judge a version haven't ended."""
        if operation["state"] != "judging":
            return 0
        broker = self.cluster.broker
        items = [item for of_one in json.loads(operation["items"]).values() for item in of_one]

        def states() -> list[str | None]:
            with broker.client.pipeline(transaction=False) as pipe:
                for item in items:
                    pipe.hget(broker.keys.item(item), "state")
                return list(pipe.execute())

        return sum(state is not None and state not in ENDED for state in broker.again(states))

    def _recent_tax(self, totals: Mapping[str, str], now: float) -> float:
        """Of the requests that ended in the last `TAX_WINDOW_S`."""
        self._waits.append((now, float(totals.get("blocked_s", 0)), float(totals.get("response_s", 0))))
        while len(self._waits) > 1 and self._waits[1][0] <= now - TAX_WINDOW_S:
            self._waits.popleft()
        (_, blocked_before, response_before), (_, blocked, response) = self._waits[0], self._waits[-1]
        blocked_s = blocked - blocked_before
        unblocked_s = response - response_before - blocked_s
        return blocked_s / unblocked_s if unblocked_s > 0 else 0.0

    def _note_empty(self, nodes: tuple[NodeView, ...], workers: tuple[WorkerView, ...], now: float) -> None:
        """Positions count as empty from when there is a living worker that could take them."""
        if all(worker.is_dead for worker in workers):
            self._empty_since = {}
            return
        empty = {
            (node.node, index)
            for node in nodes
            for index, stage in enumerate(node.stages)
            if not stage.worker
        }
        self._empty_since = {position: self._empty_since.get(position, now) for position in empty}


def node_view(node: int, fields: Mapping[str, str], stages: int) -> NodeView:
    """A node's hash as a value."""
    epoch = fields.get("epoch", "0")
    return NodeView(
        node=node,
        epoch=int(epoch),
        is_link_lost=epoch != "0" and fields.get("link_lost") == epoch,
        stages=tuple(
            StageView(
                worker=fields.get(f"stage:{stage}", ""),
                is_ready=epoch != "0" and fields.get(f"ready:{stage}") == epoch,
                training_step=int(step) if (step := fields.get(f"training:{stage}")) else None,
            )
            for stage in range(stages)
        ),
    )


def worker_views(
    workers: Mapping[str, Mapping[str, str]], *, trust_heartbeats: bool
) -> tuple[WorkerView, ...]:
    """Workers' hashes as values; of two processes in one slot, the one registered earlier is dead."""
    newest: dict[str, tuple[float, str]] = {}
    for worker, fields in workers.items():
        slot, at = fields.get("slot", worker), float(fields.get("registered_at", 0))
        newest[slot] = max(newest.get(slot, (0.0, "")), (at, worker))
    return tuple(
        WorkerView(
            worker=worker,
            is_dead=newest[fields.get("slot", worker)][1] != worker
            or (trust_heartbeats and "alive" not in fields),
        )
        for worker, fields in workers.items()
    )


def operation_view(
    operation: str,
    fields: Mapping[str, str],
    preparing: Mapping[str, str],
    nodes: tuple[NodeView, ...],
    *,
    items_left: int,
) -> OperationView:
    """An operation's hash as a value."""
    return OperationView(
        operation=operation,
        kind=fields["kind"],
        state=fields["state"],
        writers=tuple(json.loads(fields.get("writers") or "[]")),
        epochs=tuple(json.loads(fields.get("epochs") or "[]")),
        step=int(fields.get("step") or 0),
        shards_written=sum(name.startswith("shard:") for name in fields),
        stages_prepared=sum(
            f"prepared:{node.node}:{stage}" in preparing
            for node in nodes
            if node.is_ready
            for stage in range(len(node.stages))
        ),
        items_left=items_left,
    )
