"""Cluster views by value, as the reader makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lemix_common.settings import ClusterSettings
from lemix_common.store.training import RunState, run_state
from lemix_coordinator.view import ClusterView, NodeView, OperationView, StageView, WorkerView


def node_of(node: int, *steps: int | None, epoch: int = 1, ready: bool = True) -> NodeView:
    """A node whose stages' training states are at these steps."""
    return NodeView(
        node=node,
        epoch=epoch,
        stages=tuple(
            StageView(worker=f"w{node}{stage}", is_ready=ready, training_step=step)
            for stage, step in enumerate(steps)
        ),
    )


def run_of(**fields: object) -> RunState:
    """A run's state; what isn't given is as in a fresh cluster."""
    return run_state("main", {name: str(value) for name, value in fields.items()})


def operation_of(kind: str, state: str, **fields: Any) -> OperationView:
    """An operation in progress."""
    known: dict[str, Any] = {
        "writers": (),
        "epochs": (),
        "step": 0,
        "shards_written": 0,
        "stages_prepared": 0,
    }
    return OperationView(operation=f"{kind}-1", kind=kind, state=state, **(known | fields))


def view_of(
    nodes: Sequence[NodeView],
    run: RunState,
    *,
    operations: Sequence[OperationView] = (),
    draining: str = "",
    draining_in_flight: int = 0,
    draining_for_s: float = 0.0,
    is_draining_cleared: bool = False,
    divided_s: float = 0.0,
    undivided_s: float = 0.0,
    is_stopping: bool = False,
    recent_tax: float = 0.0,
    **settings: Any,
) -> ClusterView:
    """A cluster of these nodes, all workers alive."""
    shape: dict[str, Any] = {"model": "m", "nodes": len(nodes), "stages": len(nodes[0].stages)}
    return ClusterView(
        settings=ClusterSettings(**(shape | settings)),
        is_stopping=is_stopping,
        workers=tuple(
            WorkerView(worker=stage.worker, is_dead=False) for node in nodes for stage in node.stages
        ),
        nodes=tuple(nodes),
        run=run,
        served="0.0",
        draining=draining,
        draining_in_flight=draining_in_flight,
        draining_for_s=draining_for_s,
        is_draining_cleared=is_draining_cleared,
        divided_s=divided_s,
        undivided_s=undivided_s,
        operations=tuple(operations),
        recent_tax=recent_tax,
        empty_for_s={},
    )
