"""What is known of one node: when its stages are free, which backwards are to come, what is committed to it.

A node is a line of stages. A forward begins on a stage when the stage before has handed it over (the *immediate*
dependency) and the last committed forward has ended; where it would run into a backward that is still to come it waits
for that one's end (the *far* dependency). Backwards run from the last stage to the first, each when the later stage's
has ended and its own stage is free; the optimizer's step follows each.

Predictions are replaced by measurements as these arrive. What is committed to a stage runs back to back, so what a
measured end differs from the predicted one by is how much everything behind it moves too: kept as a shift of the
stage, whatever is committed to it, so that a measurement costs the same with one work waiting and with ten thousand.

Where training gives way to requests (the workers' order `urgency`), requests wait for each other only: what trains is
kept for those that train, and nothing that requests run into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from lemix_coordinator.scheduling.pass_times import PassTimes
from lemix_coordinator.scheduling.work import Work, WorkKind

Value = TypeVar("Value")

Span = tuple[float, float]
"""Begin and end, in seconds."""

SAME_S = 1e-9
"""Less than this apart, a measurement is what was predicted."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A work on its node, as it was predicted when it was placed there."""

    item: str
    kind: WorkKind
    arrived_at: float
    rows: int
    forward_end_S: tuple[float, ...]
    """Less the stages' shifts of that moment."""
    bytes_S: tuple[float, ...]
    contexts: int
    """Tokens that its rows attend to when decoding."""
    response_s: float
    """As it was predicted."""
    alone_s: float
    """What it takes on an idle node."""


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward that is still to come on a stage."""

    item: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node."""

    free_S: tuple[float, ...]
    """When the last forward committed to the stage ends."""
    shift_S: tuple[float, ...]
    """What measurements have moved the stage's predictions by."""
    backwards_S: tuple[tuple[Backward, ...], ...]
    """In their order; those that forwards already committed will have waited for are left out."""
    committed: tuple[Committed, ...] = ()
    """Not ended yet, in the order in which they were placed."""

    def find(self, item: str) -> Committed | None:
        """The committed work of this name; what is asked for is most often among the oldest."""
        for one in self.committed:
            if one.item == item:
                return one
        return None


@dataclass(frozen=True, slots=True)
class Path:
    """The way of a work through a node's stages."""

    forward_S: tuple[Span, ...]
    backward_S: tuple[Span, ...]
    """Empty of what doesn't train."""
    far_S: tuple[bool, ...]
    """Whether the forward waited for an earlier work's backward there."""
    idle_s: float
    """Mean over the stages of the time between their last forward and this one in which they have nothing to do."""


def node_since(num_stages: int, ready_at: float) -> NodeState:
    """A node that holds nothing and can begin from this moment on."""
    return NodeState((ready_at,) * num_stages, (0.0,) * num_stages, ((),) * num_stages)


def path_on(
    node: NodeState, times: PassTimes, now: float, *, forward_only: bool = False, overtakes: bool = False
) -> Path:
    """How the work would run if it were placed now; past backwards, if it overtakes them."""
    ready = now
    idle = 0.0
    forwards: list[Span] = []
    waited: list[bool] = []
    for free, backwards, seconds in zip(node.free_S, node.backwards_S, times.forward_S, strict=True):
        begin = ready if ready > free else free
        is_far = False
        busy = 0.0
        for backward in () if overtakes else backwards:
            if begin + seconds <= backward.begin:
                break
            busy += backward.end - backward.begin
            if backward.end > begin:
                begin = backward.end
                is_far = True
        idle += max(begin - free - busy, 0.0)
        forwards.append((begin, begin + seconds))
        waited.append(is_far)
        ready = begin + seconds + times.hop_s
    backwards_S = () if forward_only or not times.backward_S else _backwards(node, times, forwards)
    return Path(tuple(forwards), backwards_S, tuple(waited), idle / len(forwards))


def _backwards(node: NodeState, times: PassTimes, forwards: list[Span]) -> tuple[Span, ...]:
    """From the last stage to the first, behind the backwards that are to come there already."""
    spans: list[Span] = []
    ready = forwards[-1][1]
    for stage in reversed(range(len(forwards))):
        earlier = node.backwards_S[stage]
        begin = max(ready, forwards[stage][1], earlier[-1].end if earlier else 0.0)
        end = begin + times.backward_S[stage]
        spans.append((begin, end))
        ready = end + times.hop_s
    return tuple(reversed(spans))


def with_work(
    node: NodeState, work: Work, times: PassTimes, path: Path, response_s: float, *, gives_way: bool = False
) -> NodeState:
    """The node with this work committed to it. ``gives_way``: training does, so that nobody waits for its forward."""
    end_S = tuple([end for _, end in path.forward_S])
    free_S = node.free_S if gives_way and work.is_training else end_S
    committed = Committed(
        work.item,
        work.kind,
        work.arrived_at,
        len(work.lengths),
        tuple([end - shift for end, shift in zip(end_S, node.shift_S, strict=True)])
        if any(node.shift_S)
        else end_S,
        times.bytes_S,
        work.decoded_contexts,
        response_s,
        times.idle_s,
    )
    backwards_S = node.backwards_S
    if not gives_way and (path.backward_S or any(backwards_S)):
        backwards_S = tuple(
            [
                tuple([one for one in backwards if one.end > free])
                for backwards, free in zip(backwards_S, free_S, strict=True)
            ]
        )
    if path.backward_S:
        backwards_S = tuple(
            [
                (*backwards, Backward(work.item, *span))
                for backwards, span in zip(backwards_S, path.backward_S, strict=True)
            ]
        )
    return NodeState(free_S, node.shift_S, backwards_S, (*node.committed, committed))


def after_forward(node: NodeState, item: str, stage: int, ended: float) -> NodeState:
    """The node when a forward has been measured; the same one if it ended as predicted, or if nobody placed it."""
    committed = node.find(item)
    if committed is None:
        return node
    later = ended - (committed.forward_end_S[stage] + node.shift_S[stage])
    return node if abs(later) < SAME_S else _shifted(node, stage, later)


def after_backward(node: NodeState, item: str, stage: int, ended: float) -> NodeState:
    """The node when a backward, and the step behind it, has been measured."""
    backwards = node.backwards_S[stage]
    measured = next((one for one in backwards if one.item == item), None)
    if measured is None:  # forwards are committed behind it, or nobody placed it
        return node
    left = NodeState(
        _with(node.free_S, stage, max(node.free_S[stage], ended)),
        node.shift_S,
        _with(node.backwards_S, stage, tuple([one for one in backwards if one is not measured])),
        node.committed,
    )
    later = ended - measured.end
    if abs(later) < SAME_S or stage == 0:
        return left
    earlier_stages = tuple(
        [
            tuple([_moved(one, later) if one.item == item else one for one in waiting])
            if before < stage
            else waiting
            for before, waiting in enumerate(left.backwards_S)
        ]
    )
    return NodeState(left.free_S, left.shift_S, earlier_stages, left.committed)


def without(node: NodeState, item: str) -> NodeState:
    """The node when the work has ended, however it did."""
    committed = tuple([one for one in node.committed if one.item != item])
    backwards_S = node.backwards_S
    if any(backwards_S):
        backwards_S = tuple(
            [tuple([one for one in backwards if one.item != item]) for backwards in backwards_S]
        )
    return NodeState(node.free_S, node.shift_S, backwards_S, committed)


def _shifted(node: NodeState, stage: int, later: float) -> NodeState:
    return NodeState(
        _with(node.free_S, stage, node.free_S[stage] + later),
        _with(node.shift_S, stage, node.shift_S[stage] + later),
        _with(node.backwards_S, stage, tuple([_moved(one, later) for one in node.backwards_S[stage]])),
        node.committed,
    )


def _moved(backward: Backward, later: float) -> Backward:
    return Backward(backward.item, backward.begin + later, backward.end + later)


def _with(values: tuple[Value, ...], place: int, value: Value) -> tuple[Value, ...]:
    return (*values[:place], value, *values[place + 1 :])
