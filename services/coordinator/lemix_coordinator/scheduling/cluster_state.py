"""What the scheduler knows of a cluster: an immutable value that every event replaces.

A policy gets one and answers; what it wonders about ("what if this ran there?") leaves no trace, because there is
nothing to write to. What policies need of the past is here too, so that they keep nothing: who holds how much, the
lengths a node has had, the latest arrivals and the latest responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lemix_common.costs import Profile
from lemix_coordinator.scheduling.columns import Columns, Floats, columns_of
from lemix_coordinator.scheduling.node_state import (
    NodeState,
    after_backward,
    after_forward,
    node_since,
    path_on,
    with_work,
    without,
)
from lemix_coordinator.scheduling.pass_times import Iteration, PassTimes, iteration_of, pass_times
from lemix_coordinator.scheduling.work import Work

FEW_NODES: Final = 12
"""Up to so many are looked at one by one, which is faster than arrays."""
REMEMBERED: Final = 256
"""Latest arrivals and responses that are kept."""

UNFINISHED, TRAINING, LAST_ARRIVAL, NUM_LENGTHS, MEAN_LENGTH, SQUARES, HELD, ROWS, CONTEXTS = range(9)
"""Rows of `ClusterState.facts_FN`."""
NUM_FACTS: Final = 9


@dataclass(frozen=True, slots=True)
class Arrival:
    """A work that was placed."""

    arrived_at: float
    is_training: bool
    busiest_s: float
    """What it takes of the stage that it takes most of."""
    total_s: float
    """What it takes alone on a node."""


@dataclass(frozen=True, slots=True)
class Response:
    """A request that has ended."""

    ended_at: float
    response_s: float
    predicted_s: float
    alone_s: float


@dataclass(frozen=True, slots=True)
class History:
    """The past of the whole cluster; what is long past is forgotten."""

    arrivals: tuple[Arrival, ...] = ()
    responses: tuple[Response, ...] = ()
    num_requests: int = 0
    """Placed, ever."""
    num_trainings: int = 0
    resized_at: float = -np.inf
    """When nodes were last opened."""
    began_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """N nodes of S stages. Arrays are replaced and never written to."""

    profile: Profile
    nodes: tuple[NodeState, ...]
    is_open_N: NDArray[np.bool_]
    """Whether a node holds the model, or is loading it, and takes work."""
    facts_FN: Floats
    """By the names above: unfinished works and trainings, when the last one came, number, mean and sum of squared
    differences (Welford) of the lengths it got, bytes held on the fullest stage beside weights, rows decoding and the
    tokens these attend to."""
    columns: Columns | None
    """The same as `nodes`, of more than a few."""
    iteration: Iteration
    history: History = History()
    training_gives_way: bool = False
    """Requests overtake what trains, and wait for each other only."""

    @classmethod
    def idle(
        cls, profile: Profile, nodes: int, now: float = 0.0, *, training_gives_way: bool = False
    ) -> ClusterState:
        """So many open nodes that hold the model and have nothing to do."""
        states = (node_since(profile.num_stages, now),) * nodes
        facts_FN = np.zeros((NUM_FACTS, nodes))
        facts_FN[LAST_ARRIVAL] = now
        columns = columns_of(states) if nodes > FEW_NODES else None
        return cls(
            profile,
            states,
            np.ones(nodes, dtype=bool),
            facts_FN,
            columns,
            iteration_of(profile),
            History(began_at=now),
            training_gives_way,
        )

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def num_open(self) -> int:
        """Nodes that take work."""
        return int(np.count_nonzero(self.is_open_N))

    @property
    def unfinished_N(self) -> Floats:
        """Works on each node that haven't ended."""
        row: Floats = self.facts_FN[UNFINISHED]
        return row

    @property
    def held_bytes_N(self) -> Floats:
        """Memory in use on each node's fullest stage, without weights."""
        row: Floats = self.facts_FN[HELD]
        return row

    @property
    def room_bytes(self) -> float:
        """Memory of the stage with the least beside weights, gradients and optimizer state."""
        return self.profile.memory_bytes - max(
            stage.weight_bytes + stage.training_bytes for stage in self.profile.stages
        )

    def assigned(self, work: Work, node: int, now: float) -> ClusterState:
        """The work's predicted path is committed to the node."""
        times = pass_times(self.profile, work)
        before = self.nodes[node]
        path = path_on(before, times, now, overtakes=self.overtakes(work))
        response_s = path.forward_S[-1][1] - work.arrived_at + self.decode_s(work, node)
        after = with_work(before, work, times, path, response_s, gives_way=self.training_gives_way)
        facts_FN = self.facts_FN.copy()
        facts_FN[:, node] = _facts_with(facts_FN[:, node].tolist(), work, times)
        history = self.history
        arrival = Arrival(work.arrived_at, work.is_training, times.busiest_s, times.total_s)
        history = History(
            (*history.arrivals[-REMEMBERED + 1 :], arrival),
            history.responses,
            history.num_requests + (not work.is_training),
            history.num_trainings + work.is_training,
            history.resized_at,
            history.began_at,
        )
        return self._with(node, after, facts_FN, history)

    def forward_measured(self, item: str, node: int, stage: int, began: float, ended: float) -> ClusterState:
        """A forward of this work has ended on this stage (a request's prompt; of training, the last microbatch)."""
        del began  # what ran before it, its own end says as well
        before = self.nodes[node]
        committed = before.find(item) if self.training_gives_way else None
        if committed is not None and committed.kind == "train":
            return self  # nobody waits for it
        after = after_forward(before, item, stage, ended)
        return self if after is before else self._with(node, after, self.facts_FN, self.history)

    def backward_measured(self, item: str, node: int, stage: int, began: float, ended: float) -> ClusterState:
        """A backward, with the step behind it, has ended on this stage."""
        del began
        before = self.nodes[node]
        after = after_backward(before, item, stage, ended)
        return self if after is before else self._with(node, after, self.facts_FN, self.history)

    def ended(self, item: str, node: int, now: float) -> ClusterState:
        """The work is over, done or not: what it held is free. Nothing changes if the node didn't have it."""
        before = self.nodes[node]
        committed = before.find(item)
        if committed is None:
            return self
        after = without(before, item)
        facts_FN = self.facts_FN.copy()
        facts_FN[UNFINISHED, node] -= 1
        facts_FN[HELD, node] = facts_FN[HELD, node] - max(committed.bytes_S) if after.committed else 0.0
        history = self.history
        if committed.kind == "train":
            facts_FN[TRAINING, node] -= 1
        else:
            if committed.kind == "generate":
                facts_FN[ROWS, node] -= committed.rows
                facts_FN[CONTEXTS, node] -= committed.contexts
            response = Response(now, now - committed.arrived_at, committed.response_s, committed.alone_s)
            history = History(
                history.arrivals,
                (*history.responses[-REMEMBERED + 1 :], response),
                history.num_requests,
                history.num_trainings,
                history.resized_at,
                history.began_at,
            )
        return self._with(node, after, facts_FN, history)

    def opening(self, node: int, ready_at: float) -> ClusterState:
        """The node begins to load the model: it takes work, and runs none before this moment."""
        before = self.nodes[node]
        free_S = tuple([max(free, ready_at) for free in before.free_S])
        after = NodeState(free_S, before.shift_S, before.backwards_S, before.committed)
        loading = self._with(node, after, self.facts_FN, self.history)
        return loading._opened(node, is_open=True, at=ready_at)  # noqa: SLF001 - a state of the same class

    def closed(self, node: int) -> ClusterState:
        """The node takes no more work; what it has it ends."""
        return self._opened(node, is_open=False, at=None)

    def overtakes(self, work: Work) -> bool:
        """Whether backwards that are still to come make way for the work."""
        return self.training_gives_way and not work.is_training

    def decode_s(self, work: Work, node: int) -> float:
        """From the first to the last token of a generation, with the rows that the node decodes now."""
        if work.new_tokens <= 1:
            return 0.0
        rows = float(self.facts_FN[ROWS, node]) + len(work.lengths)
        contexts = float(self.facts_FN[CONTEXTS, node]) + work.decoded_contexts
        return (work.new_tokens - 1) * self.iteration.of(rows, contexts)

    def _opened(self, node: int, *, is_open: bool, at: float | None) -> ClusterState:
        is_open_N = self.is_open_N.copy()
        is_open_N[node] = is_open
        past = self.history
        moment = past.resized_at if at is None else at
        history = History(
            past.arrivals, past.responses, past.num_requests, past.num_trainings, moment, past.began_at
        )
        return ClusterState(
            self.profile,
            self.nodes,
            is_open_N,
            self.facts_FN,
            self.columns,
            self.iteration,
            history,
            self.training_gives_way,
        )

    def _with(self, node: int, after: NodeState, facts_FN: Floats, history: History) -> ClusterState:
        columns = self.columns
        if columns is not None:
            columns = columns.replaced(node, after, had_backwards=any(self.nodes[node].backwards_S))
        nodes = (*self.nodes[:node], after, *self.nodes[node + 1 :])
        return ClusterState(
            self.profile,
            nodes,
            self.is_open_N,
            facts_FN,
            columns,
            self.iteration,
            history,
            self.training_gives_way,
        )


def _facts_with(facts_F: list[float], work: Work, times: PassTimes) -> list[float]:
    facts_F[UNFINISHED] += 1
    facts_F[TRAINING] += work.is_training
    facts_F[LAST_ARRIVAL] = work.arrived_at
    length = max(work.lengths)
    facts_F[NUM_LENGTHS] += 1
    off = length - facts_F[MEAN_LENGTH]
    facts_F[MEAN_LENGTH] += off / facts_F[NUM_LENGTHS]
    facts_F[SQUARES] += off * (length - facts_F[MEAN_LENGTH])
    facts_F[HELD] += max(times.bytes_S)
    if work.kind == "generate":
        facts_F[ROWS] += len(work.lengths)
        facts_F[CONTEXTS] += work.decoded_contexts
    return facts_F
