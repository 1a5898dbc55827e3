"""When a version is published or checkpointed, and what each operation in progress needs next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lemix_coordinator.commands import (
    AdvanceOperation,
    ChooseWriters,
    ClearVersion,
    OpenSnapshot,
    RetireVersion,
)
from lemix_coordinator.training import writers_at
from lemix_coordinator.view import ClusterView, OperationView

IDLE_DRAIN_SHARE: Final = 0.5
"""In place of ``max_drain_share``, while no step is planned."""


def snapshots(
    view: ClusterView,
) -> Iterator[OpenSnapshot | ChooseWriters | AdvanceOperation | RetireVersion | ClearVersion]:
    """Open what is due, move on what is open, retire what nobody uses.

    At most two served versions live: a third is begun only when the draining one is retired, and for that one who waits
    ``max_drain_s`` has its last items leave it. The next one waits until drains have cost ``max_drain_share`` of
    the time at most (see `drains`).
    """
    run = view.run
    writers = writers_at(view, run.committed)
    for operation in view.operations:
        yield from _advance(view, operation, writers)
    behind = run.committed - max(run.published, run.held_back)
    if writers is not None:
        if _is_publish_due(view, behind) and not view.draining and _has_rested(view):
            yield OpenSnapshot("publish", *writers, f"{behind} committed steps are not served")
        due = run.committed - run.checkpoint >= view.settings.checkpoint_every
        if due and view.operation_of("checkpoint") is None:
            yield OpenSnapshot("checkpoint", *writers, f"the last checkpoint is of step {run.checkpoint}")
    if view.draining and not view.draining_in_flight:
        yield RetireVersion(view.draining)
    elif view.draining and _must_clear(view, behind):
        yield ClearVersion(view.draining)


def _is_publish_due(view: ClusterView, behind: int) -> bool:
    run = view.run
    is_idle = run.planned == run.committed
    is_free = view.operation_of("publish") is None and view.operation_of("rollback") is None
    return is_free and behind > 0 and (behind >= view.settings.publish_every or is_idle)


def _has_rested(view: ClusterView) -> bool:
    """Times in which requests of two versions took turns are kept a small part of all, for those served.

    While nothing more is planned, it is half at most: whoever taught the model something waits to see it.
    """
    share = view.settings.max_drain_share
    if view.run.planned == view.run.committed:
        share = max(share, IDLE_DRAIN_SHARE)
    return view.undivided_s >= view.divided_s * (1 / share - 1)


def _must_clear(view: ClusterView, behind: int) -> bool:
    """The draining version has had its time, and another one waits for its place."""
    waiting = [view.operation_of("publish"), view.operation_of("rollback")]
    return (
        not view.is_draining_cleared
        and view.draining_for_s >= view.settings.max_drain_s
        and (_is_publish_due(view, behind) or any(waiting))
    )


def _advance(
    view: ClusterView, operation: OperationView, writers: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> Iterator[ChooseWriters | AdvanceOperation]:
    stages = view.settings.stages
    match operation.state:
        case "requested" if operation.kind == "rollback":
            if not view.draining:  # a third served version has no place
                yield AdvanceOperation(operation.operation, "requested")
        case "requested" if not operation.writers:
            if writers is not None:
                yield ChooseWriters(operation.operation, "requested", *writers, "asked for")
        case "requested" | "writing" if not _writers_live(view, operation):
            if writers is not None:
                yield ChooseWriters(operation.operation, operation.state, *writers, "a writer was lost")
        case "writing" if operation.shards_written < stages:
            return
        case "writing" if operation.kind == "publish" and view.draining:
            return  # a rollback came first
        case "preparing" if not _all_prepared(view, operation):
            return
        case "judging" if operation.items_left:
            return
        case state:
            yield AdvanceOperation(operation.operation, state)


def _writers_live(view: ClusterView, operation: OperationView) -> bool:
    """Each is where it was chosen and has, or had, the state to write; one that was left behind will never have it."""
    step = operation.step if operation.state == "writing" else view.run.committed
    nodes = {node.node: node for node in view.nodes}
    writers = zip(operation.writers, operation.epochs, strict=True)
    return all(
        writer in nodes
        and nodes[writer].epoch == epoch
        and (at := nodes[writer].stages[stage].training_step) is not None
        and at >= step
        for stage, (writer, epoch) in enumerate(writers)
    )


def _all_prepared(view: ClusterView, operation: OperationView) -> bool:
    ready = sum(len(node.stages) for node in view.nodes if node.is_ready)
    return 0 < ready <= operation.stages_prepared
