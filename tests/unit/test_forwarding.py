"""A later stage computes iterations in the order in which they were planned, each once, and forgets with its node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lemix_common.messages import ForwardFailed, Frame, RunForward
from lemix_stage_worker.forwarding import Arrived, Forwarding
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.ready_queue import ReadyQueue, Task

NODES, STAGES = (0, 1), (1, 2)
POISON = 7
"""An iteration of so many tokens can't be computed."""


@dataclass
class Loop:
    """A worker's compute loop with later stages of two nodes; it runs a step only when the test says so."""

    ready: ReadyQueue = field(default_factory=ReadyQueue)
    failures: list[ForwardFailed] = field(default_factory=list)
    hosts: dict[tuple[int, int], HostedStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in NODES:
            for stage in STAGES:
                self.hosts[node, stage] = HostedStage(
                    node=node,
                    stage=stage,
                    stages=3,
                    source=cast("Any", None),
                    template=cast("Any", None),
                    versions={},
                    training=None,
                )

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage."""
        assert (stage, tensors, isinstance(frame, ForwardFailed)) == (0, (), True)
        assert isinstance(frame, ForwardFailed)
        assert frame.node == host.node
        self.failures.append(frame)

    def schedule(self, task: Task) -> None:
        """It is ready."""
        self.ready.add(task)

    def turn(self) -> None:
        """The most urgent step, if there is one."""
        if self.ready:
            step = self.ready.take()
            try:
                step.advance()
            except FloatingPointError as error:
                step.task.failed(error)


@dataclass
class Recorded(Forwarding):
    """What it computes is noted, not computed."""

    computed: list[tuple[int, int, int]] = field(default_factory=list)
    """(node, stage, iteration)."""

    def compute(self, host: HostedStage, frame: RunForward, tensors: Sequence[Tensor]) -> None:
        """Note it."""
        assert not tensors
        self.computed.append((host.node, host.stage, frame.iteration))
        if sum(frame.lengths) == POISON:
            raise FloatingPointError("no such luck")


@dataclass
class Stages:
    """The stages and what arrived at them."""

    loop: Loop = field(default_factory=Loop)
    arrived: list[tuple[int, int, int]] = field(default_factory=list)
    poisoned: list[tuple[int, int]] = field(default_factory=list)
    forgotten: set[tuple[int, int, int]] = field(default_factory=set)
    released: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forwarding = Recorded(self.loop)

    def arrive(self, node: int, stage: int, length: int) -> None:
        """The node's next iteration, a decode or a chunk."""
        name = (node, stage, len(self.arrived))
        self.arrived.append(name)
        frame = RunForward(
            node=node,
            stage=stage,
            epoch=1,
            iteration=name[2],
            version="0.0",
            numbers=(0,),
            starts=(0,),
            lengths=(length,),
            tables=(0,),
            wants=(0,),
            slowest_s=0.0,
        )
        self.poisoned += [(node, name[2])] if length == POISON else []
        release: Callable[[], None] = lambda: self.released.append(name)  # noqa: E731 - it is a field's value
        self.forwarding.arrive(self.loop.hosts[node, stage], Arrived(frame, (), release, 0.0))

    def turn(self) -> None:
        """The compute loop's."""
        self.loop.turn()

    def forget(self, node: int) -> None:
        """The node starts afresh."""
        waiting = set(self.arrived) - set(self.forwarding.computed)
        self.forgotten |= {name for name in waiting if name[0] == node}
        self.forwarding.forget(node)


Step = Callable[[Stages], None]
Steps: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(
        st.builds(
            lambda node, stage, length: lambda stages: stages.arrive(node, stage, length),
            st.sampled_from(NODES),
            st.sampled_from(STAGES),
            st.sampled_from([1, 1, 64, POISON]),
        ),
        st.just(Stages.turn),
        st.just(Stages.turn),
        st.builds(lambda node: lambda stages: stages.forget(node), st.sampled_from(NODES)),
    ),
    max_size=50,
)


@given(Steps)
@settings(deadline=None)
def test_no_iteration_overtakes_another_of_its_node(steps: list[Step]) -> None:
    """Decodes don't pass chunks; failures and forgetting hold up nobody; memory of frames is given back once."""
    stages = Stages()
    for step in steps:
        step(stages)
    while stages.loop.ready:
        stages.turn()
    computed = stages.forwarding.computed
    for position in stages.loop.hosts:
        expected = [name for name in stages.arrived if name[:2] == position and name not in stages.forgotten]
        assert [name for name in computed if name[:2] == position] == expected
    assert sorted(stages.released) == sorted(stages.arrived)
    reported = [(failure.node, failure.iteration) for failure in stages.loop.failures]
    done = {(node, iteration) for node, _, iteration in computed}
    assert sorted(reported) == sorted(set(stages.poisoned) & done)


def test_a_decode_of_one_node_passes_a_chunk_of_another() -> None:
    """Urgency counts between nodes."""
    stages = Stages()
    stages.arrive(0, 1, 64)
    stages.arrive(1, 1, 1)
    stages.turn()
    assert stages.forwarding.computed == [(1, 1, 1)]


def test_what_is_on_its_way_is_dropped_with_its_node() -> None:
    """It was scheduled already: nothing is computed, and what comes in the new epoch isn't held up."""
    stages = Stages()
    stages.arrive(0, 1, 64)
    stages.arrive(0, 1, 1)
    stages.forget(0)
    assert stages.released == [(0, 1, 0), (0, 1, 1)]
    stages.arrive(0, 1, 1)
    while stages.loop.ready:
        stages.turn()
    assert stages.forwarding.computed == [(0, 1, 2)]
    assert len(stages.released) == 3
