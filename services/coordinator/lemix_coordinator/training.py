"""When a step runs, with whom, and how nodes that lost their training state get it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lemix_coordinator.commands import ForgetSteps, LoadTraining, OpenSnapshot, StartStep
from lemix_coordinator.view import ClusterView, NodeView


def train(view: ClusterView) -> Iterator[StartStep | LoadTraining | OpenSnapshot | ForgetSteps]:
    """The next thing training needs, if anything.

    An attempt whose members all live goes on, where steps overlap with the next planned step. Otherwise, with every
    able node at the committed step: the next planned step, unless training costs requests too much. A node that
    lacks the committed state takes it from a checkpoint that living stages write now; where nobody
    has that state any more, all go back to the last checkpoint and replay the committed steps.
    """
    run = view.run
    wanted = set(view.settings.training_nodes)
    able = [node for node in view.nodes if node.is_ready and node.node in wanted]
    if run.refused:  # those that have the state go on, until a new checkpoint gives it to the others
        able = [node for node in able if node.training_step == run.committed]
    if run.in_flight and _attempt_lives(view):
        if _may_go_on(view, able):
            yield StartStep(run.attempt_last + 1, run.members, run.epochs, "overlapping", goes_on=True)
        return
    if not able or run.rolling_back or _loading(view):
        return
    levels = {node.training_step for node in able}
    if levels == {run.committed}:
        if run.planned > run.committed and not view.is_stopping and not _costs_too_much(view):
            reason = "another attempt" if run.in_flight else "next"
            yield StartStep(run.committed + 1, _indices(able), _epochs(able), reason)
    elif (writers := writers_at(view, run.committed)) is not None:
        lacking = [node for node in able if node.training_step != run.committed]
        if run.checkpoint == run.committed:
            reason = "these nodes lack the committed state"
            yield LoadTraining(
                run.committed, run.checkpoint_directory, _indices(lacking), _epochs(lacking), reason
            )
        elif view.operation_of("checkpoint") is None:
            yield OpenSnapshot("checkpoint", *writers, "a node needs the training state")
    elif len(levels) == 1 and (level := levels.pop()) is not None and run.checkpoint <= level < run.committed:
        yield StartStep(level + 1, _indices(able), _epochs(able), "replay")
    else:
        reason = "no living stage has the committed state"
        yield LoadTraining(run.checkpoint, run.checkpoint_directory, _indices(able), _epochs(able), reason)


def forget(view: ClusterView) -> Iterator[ForgetSteps]:
    """Steps whose payloads nobody can need again."""
    upto = min(view.run.checkpoint, view.run.published)
    if upto >= view.run.kept_from:
        yield ForgetSteps(upto)


def writers_at(view: ClusterView, step: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """For each stage a node whose living stage is at ``step`` (nodes and their epochs), or None.

    A whole node's, if there is one: stages of a node that isn't whole may be left behind by the next step.
    """
    writers = []
    whole_first = sorted(view.nodes, key=lambda node: not (node.is_ready and node.training_step == step))
    for stage in range(view.settings.stages):
        holder = next(
            (
                node
                for node in whole_first
                if node.stages[stage].is_ready and node.stages[stage].training_step == step
            ),
            None,
        )
        if holder is None:
            return None
        writers.append(holder)
    return _indices(writers), _epochs(writers)


def _attempt_lives(view: ClusterView) -> bool:
    """Every member is where the attempt found it: in the same placement, at the step before.

    One that says it is a step further had that step's optimizer still to run when its node was placed anew.
    """
    before = view.run.attempt_done
    at = {node.node: (node.epoch, node.training_step) for node in view.nodes if node.is_ready}
    members = zip(view.run.members, view.run.epochs, strict=True)
    return all(at.get(member) == (epoch, before) for member, epoch in members)


def _may_go_on(view: ClusterView, able: Sequence[NodeView]) -> bool:
    """With `a-pp`, while nobody waits to take part, the next step begins before the last one's commit."""
    run = view.run
    return (
        view.settings.overlaps_steps
        and run.attempt_last == run.attempt_done + 1
        and run.attempt_last < run.planned
        and {node.node for node in able} <= set(run.members)
        and not view.is_stopping
        and not _costs_too_much(view)
    )


def _costs_too_much(view: ClusterView) -> bool:
    """Requests that ended lately waited more for training than they may: the next step waits until they don't."""
    return view.recent_tax > view.settings.max_training_tax > 0


def _loading(view: ClusterView) -> bool:
    nodes = {(node.node, node.epoch): node for node in view.nodes if node.is_ready}
    told = [nodes[at] for at in view.run.loading if at in nodes]
    return any(stage.training_step is None for node in told for stage in node.stages)


def _indices(nodes: Sequence[NodeView]) -> tuple[int, ...]:
    return tuple(node.node for node in nodes)


def _epochs(nodes: Sequence[NodeView]) -> tuple[int, ...]:
    return tuple(node.epoch for node in nodes)
