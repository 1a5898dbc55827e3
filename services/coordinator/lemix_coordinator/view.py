"""What the coordinator knows when it decides: frozen values, read from Redis by `reader`, given to the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lemix_common.settings import ClusterSettings
from lemix_common.store.training import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A registered worker process."""

    worker: str
    is_dead: bool
    """Its heartbeat expired, or a newer process took its slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage position of a node."""

    worker: str
    """Its host, or '' while it has none."""
    is_ready: bool
    """The host reported it in the node's current epoch."""
    training_step: int | None
    """The step its training state is at, where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A pipeline replica."""

    node: int
    epoch: int
    stages: tuple[StageView, ...]
    is_link_lost: bool = False
    """A connection between its stages broke in this epoch, so messages may be lost."""

    @property
    def is_ready(self) -> bool:
        """Every stage can serve."""
        return bool(self.stages) and all(stage.is_ready for stage in self.stages)

    @property
    def training_step(self) -> int | None:
        """The step that all stages' training states are at, if they agree."""
        steps = {stage.training_step for stage in self.stages}
        return steps.pop() if len(steps) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationView:
    """An operation in progress."""

    operation: str
    kind: str
    state: str
    writers: tuple[int, ...]
    epochs: tuple[int, ...]
    """The writers' placement epochs when they were chosen."""
    step: int
    """The state to be written, once that is decided."""
    shards_written: int
    stages_prepared: int
    items_left: int = 0
    """Of those that judge it, the ones that haven't ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Everything the rules look at."""

    settings: ClusterSettings
    is_stopping: bool
    workers: tuple[WorkerView, ...]
    nodes: tuple[NodeView, ...]
    run: RunState
    served: str
    draining: str
    """The version that served before, while items still use it; '' if none does."""
    draining_in_flight: int
    draining_for_s: float
    """Since another version took its place."""
    is_draining_cleared: bool
    """Its last items have been told to leave it."""
    divided_s: float
    """In which requests of two versions took turns, the last time a version drained."""
    undivided_s: float
    """All other time since that began."""
    operations: tuple[OperationView, ...]
    recent_tax: float
    """The training tax of the requests that ended in the last seconds; 0 if none did."""
    empty_for_s: Mapping[tuple[int, int], float]
    """(node, stage) to how long it has had no host, though a worker lives."""

    def operation_of(self, kind: str) -> OperationView | None:
        """The operation of a kind that is in progress."""
        return next((operation for operation in self.operations if operation.kind == kind), None)
