# ruff: noqa: ARG002 - the surroundings take what they are given
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lemix_common.ids import Version
from lemix_common.messages import AddShardGradients, Frame, LoadTraining, RunStep, StepCommitted, WriteShards
from lemix_common.settings import ClusterSettings
from lemix_common.store.training import GradientReport, PlannedStep
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.learning import Learner
from lemix_stage_worker.ready_queue import Task
from lemix_stage_worker.step_work import StepWork

PLANNED = PlannedStep(
    run="main",
    step=5,
    items=("a",),
    cuts=(1,),
    shards=(0,),
    reference_tokens=1,
    learning_rate=0.1,
    weight_decay=0.0,
    seed=0,
)
ABOUT: dict[str, Any] = {"run": "main", "lineage": 0, "shard_nodes": (0,), "members": (0,), "epochs": (1,)}
RUN_STEP = RunStep(step=5, attempt=3, weights=4, **ABOUT)
COMMITTED = StepCommitted(run="main", step=5, attempt=3, replay=0, scale=1.0)


@dataclass
class CountingState:
    """A training state that only counts, over two safepoints."""

    step: int = 4

    @property
    def version(self) -> Version:
        """What it has come to."""
        return Version(0, self.step)

    def drop_gradients(self) -> None:
        """There are none."""

    def weights_at(self, step: int) -> None:
        """None."""

    def apply(self, *_: object, scale: float) -> Iterator[None]:
        """Count at the end."""
        assert scale == 1.0
        yield
        self.step += 1

    def squares(self, gradients: Mapping[str, Tensor]) -> tuple[float, ...]:
        """Of none."""
        assert not gradients
        return ()

    def snapshot(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Nothing."""
        assert not optimizer
        return {}


@dataclass
class Around:
    """Notes what the learner asks for; its tasks run when the test says so."""

    said: list[tuple[object, ...]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """Nobody is there."""

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """Nobody is there."""

    def schedule(self, task: Task) -> None:
        """Keep it."""
        self.tasks.append(task)

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Note it."""
        self.said.append(("gradients_ready", step, attempt))

    def training_at(self, host: HostedStage, step: int) -> None:
        """Note it, with the epoch it is said in."""
        self.said.append(("training_at", step, host.epoch))

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Note it."""
        self.said.append(("write_shard", request.step))

    def fetch_step(self, host: HostedStage, notice: RunStep) -> None:
        """Note it."""
        self.said.append(("fetch_step", notice.step, notice.attempt))

    def run_all(self, between: Callable[[], None] = lambda: None) -> None:
        """Run what was scheduled; ``between`` happens at each safepoint."""
        while self.tasks:
            for _ in self.tasks.pop(0).run() or ():
                between()


def learner_with_gradients() -> tuple[Learner, Around]:
    """A stage at step 4 that has reported its gradients of step 5."""
    around, state = Around(), CountingState()
    nothing: Any = None
    training: Any = state
    host = HostedStage(
        node=0, stage=0, stages=1, source=nothing, template=nothing, versions={}, training=training, epoch=1
    )
    work = StepWork(RUN_STEP, node=0, planned=PLANNED)
    work.total = {}
    settings = ClusterSettings(model="m")
    return Learner(host, settings, around, now=lambda: 0.0, attempt=3, steps={5: work}), around


def step_of(learner: Learner) -> int:
    """Where its state is."""
    assert learner.host.training is not None
    return learner.host.training.step


def test_a_commit_moves_the_state_once() -> None:
    """A repeated notice, or one of another attempt, moves nothing."""
    learner, around = learner_with_gradients()
    learner.step_committed(COMMITTED)
    around.run_all()
    learner.step_committed(COMMITTED)
    around.run_all()
    assert step_of(learner) == 5
    other, around = learner_with_gradients()
    other.step_committed(StepCommitted(run="main", step=5, attempt=2, replay=0, scale=1.0))
    around.run_all()
    assert step_of(other) == 4


def test_a_commit_is_silent_while_the_placement_stays() -> None:
    """The commit itself told where every member is."""
    learner, around = learner_with_gradients()
    learner.step_committed(COMMITTED)
    around.run_all()
    assert around.said == []


def test_an_optimizer_that_ends_in_another_placement_says_where_it_is() -> None:
    """The node was placed anew before, or while, it ran: what was reported then is a step too old."""
    learner, around = learner_with_gradients()
    learner.host.epoch = 2
    learner.step_committed(COMMITTED)
    around.run_all()
    assert around.said == [("training_at", 5, 2)]
    learner, around = learner_with_gradients()
    learner.step_committed(COMMITTED)
    around.run_all(between=lambda: setattr(learner.host, "epoch", 3))
    assert around.said == [("training_at", 5, 3)]


def test_a_committed_step_is_applied_though_the_next_attempt_has_begun() -> None:
    """The next step's notice may come before the optimizer has run."""
    learner, around = learner_with_gradients()
    learner.step_committed(COMMITTED)
    learner.run_step(RunStep(step=6, attempt=4, weights=5, **ABOUT))
    around.run_all()
    assert step_of(learner) == 5
    assert list(learner.steps) == [6]


def test_gradients_of_an_attempt_that_was_replaced_are_never_applied() -> None:
    """Its commit can't come any more; should its notice be late, nothing happens."""
    learner, around = learner_with_gradients()
    learner.run_step(RunStep(step=5, attempt=4, weights=4, **ABOUT))
    learner.step_committed(COMMITTED)
    around.run_all()
    assert step_of(learner) == 4


def test_a_snapshot_waits_for_its_step() -> None:
    """Asked for right after the commit, it is written when the optimizer has run; an older one never."""
    learner, around = learner_with_gradients()
    about: dict[str, Any] = {"run": "main", "lineage": 0, "optimizer": 0, "writers": (0,), "directory": "/x"}
    learner.step_committed(COMMITTED)
    learner.write_shards(WriteShards(operation="b", step=5, **about))
    assert around.said == []
    around.run_all()
    learner.write_shards(WriteShards(operation="a", step=4, **about))
    assert around.said == [("write_shard", 5)]
    assert learner.snapshots == []


def test_steps_that_overlap_are_reported_in_their_order() -> None:
    """Another node's gradients of the later one came first: its last report would commit nothing, and come no more."""
    learner, around = learner_with_gradients()
    nothing: Any = object()
    elsewhere: dict[str, Any] = ABOUT | {"shard_nodes": (1,), "members": (0, 1), "epochs": (1, 1)}
    for step in (5, 6):
        notice = RunStep(step=step, attempt=3, weights=4, **elsewhere)
        learner.steps[step] = StepWork(notice, node=0, weights=nothing)
        learner.steps[step].plan(replace(PLANNED, step=step), {}, 0.0)
    for step in (6, 5):
        about: dict[str, Any] = {"node": 0, "stage": 0, "epoch": 1, "run": "main", "step": step, "attempt": 3}
        learner.frame(AddShardGradients(shard=0, **about), (), lambda: None, 0.0)
    assert around.said == [("gradients_ready", 5, 3), ("gradients_ready", 6, 3)]


def test_a_stage_that_is_told_to_load_forgets_its_attempt() -> None:
    """Only in the epoch that was meant."""
    about: dict[str, Any] = {"run": "main", "step": 2, "lineage": 0, "directory": "/x", "nodes": (0,)}
    learner, around = learner_with_gradients()
    assert not learner.load(LoadTraining(epochs=(2,), **about))
    assert step_of(learner) == 4
    assert learner.load(LoadTraining(epochs=(1,), **about))
    learner.step_committed(COMMITTED)
    around.run_all()
    assert (learner.host.training, learner.steps) == (None, {})
