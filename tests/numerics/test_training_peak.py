# ruff: noqa: ARG002 - the surroundings take what they are given
"""The most memory that training steps take on a stage, against what was predicted before they began.

Every tensor that an operation makes is counted for as long as it lives, so the peak is of the tensors themselves: what
an allocator rounds up or keeps for later is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from devices import cpu_only
from lemix_common.ids import Version
from lemix_common.messages import Frame, RunStep, StepCommitted, TrainBackward, TrainForward, WriteShards
from lemix_common.settings import ClusterSettings
from lemix_common.store.training import GradientReport, PlannedStep
from lemix_stage_worker.activation_memory import measure_activations, predict_memory, training_way
from lemix_stage_worker.hosted_stage import HostedStage, build_template, load_version, training_on
from lemix_stage_worker.learning import Learner
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import ModelSource, open_model
from lemix_stage_worker.ready_queue import Task
from numerics.subjects import random_tensors, write_model

STAGES, MICROBATCHES = 3, 4
LENGTHS = (100, 60, 32)
ABOUT: dict[str, Any] = {"node": 0, "epoch": 1, "run": "main", "attempt": 1}

pytestmark = cpu_only


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all tensors made under it that are still there, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, num_bytes: int) -> None:
        self.now -= num_bytes


@dataclass
class Neighbours:
    """The other stages, who answer at once; and the loop, which runs what is to be done one by one."""

    host: HostedStage
    hidden_size: int
    learner: Learner | None = None
    tasks: list[Task] = field(default_factory=list)
    to_come: list[int] = field(default_factory=list)
    reports: list[GradientReport] = field(default_factory=list)

    def begin(self, step: int) -> None:
        """Plan a step and let it run to its last gradient, then commit it."""
        assert self.learner is not None
        notice = RunStep(
            run="main", step=step, attempt=step, lineage=0, weights=step - 1, shard_nodes=(0,) * 4,
            members=(0,), epochs=(1,),
        )  # fmt: skip
        planned = PlannedStep(
            run="main", step=step, items=("item",) * MICROBATCHES * len(LENGTHS), cuts=(len(LENGTHS),) * MICROBATCHES,
            shards=tuple(range(MICROBATCHES)), reference_tokens=MICROBATCHES * sum(LENGTHS), learning_rate=1e-3,
            weight_decay=0.0, seed=0, optimizer=self.learner.settings.optimizer,
        )  # fmt: skip
        self.learner.run_step(notice)
        example = [((5,) * (length // 2), (6,) * (length - length // 2)) for length in LENGTHS]
        mine = range(MICROBATCHES) if self.host.is_first else ()
        self.to_come = [] if self.host.is_first else list(range(MICROBATCHES))
        self.learner.step_fetched(notice, planned, dict.fromkeys(mine, example))
        ahead = MICROBATCHES if self.learner.settings.schedule == "gpipe" else STAGES - self.host.stage
        for _ in range(ahead):
            self._feed(step)
        while self.tasks:
            self.tasks.sort(key=lambda task: task.urgency)
            for _ in self.tasks.pop(0).run() or ():
                pass
        assert len(self.reports) == step
        assert self.reports[-1].is_finite
        self.learner.step_committed(StepCommitted(run="main", step=step, attempt=step, replay=0, scale=1.0))
        (optimizer,) = self.tasks
        self.tasks = []
        for _ in optimizer.run() or ():
            pass

    def _feed(self, step: int) -> None:
        """The stage before sends its next microbatch."""
        assert self.learner is not None
        if not self.to_come:
            return
        hidden_BTD = torch.randn(1, sum(LENGTHS), self.hidden_size)
        frame = TrainForward(
            **(ABOUT | {"attempt": step}), stage=self.host.stage, step=step, microbatch=self.to_come.pop(0),
            version=f"0.{step - 1}", lengths=LENGTHS,
        )  # fmt: skip
        self.learner.frame(frame, (hidden_BTD, torch.full((1, sum(LENGTHS)), 6)), lambda: None, 0.0)

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """What goes forward comes back as a gradient; what goes back makes room for the next microbatch."""
        assert self.learner is not None
        match frame:
            case TrainForward(step=step, microbatch=microbatch):
                back = TrainBackward(
                    **(ABOUT | {"attempt": step}), stage=host.stage, step=step, microbatch=microbatch,
                    version=f"0.{step - 1}",
                )  # fmt: skip
                self.learner.frame(back, (torch.randn_like(tensors[0]),), lambda: None, 0.0)
            case TrainBackward(step=step):
                self._feed(step)

    def schedule(self, task: Task) -> None:
        """Keep it for the loop."""
        self.tasks.append(task)

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Keep the report."""
        self.reports.append(report)

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """There is no other node."""

    def training_at(self, host: HostedStage, step: int) -> None:
        """Nobody asks."""

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """Nobody asks."""

    def fetch_step(self, host: HostedStage, notice: RunStep) -> None:
        """It is given."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Six layers whose activations and weights are of about one size."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return open_model(write_model(tmp_path_factory.mktemp("peak"), config, random_tensors(config)))


CASES: list[dict[str, Any]] = [
    {"schedule": "1f1b"},
    {"schedule": "gpipe"},
    {"schedule": "zero-bubble"},
    {"schedule": "1f1b", "recompute": True},
    {"schedule": "1f1b", "optimizer": "sgd"},
]


def _ids() -> Iterator[str]:
    return (" ".join(map(str, case.values())) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=_ids())
@pytest.mark.parametrize("stage", range(STAGES))
def test_training_takes_what_was_predicted(source: ModelSource, stage: int, case: dict[str, Any]) -> None:
    """Three steps of four packed microbatches: the peak is at most 1.1 times the prediction, at least half of it."""
    settings = ClusterSettings(model="m", stages=STAGES, microbatches=MICROBATCHES, **case)
    cut = cut_model(source, STAGES)
    template = build_template(source, stage, cut)
    with LiveTensors() as live:
        state = training_on(load_version(source, template, ""), template, Version(0, 0))
        host = HostedStage(
            node=0, stage=stage, stages=STAGES, source=source, template=template, versions={}, training=state, epoch=1
        )  # fmt: skip
        around = Neighbours(host, source.hidden_size)
        around.learner = Learner(host, settings, around, now=lambda: 0.0)
        for step in range(1, 4):
            around.begin(step)
        assert state.step == 3
    way = training_way(settings, stage)
    predicted = predict_memory(state.model, measure_activations(state.model), [LENGTHS] * MICROBATCHES, way)
    print(
        f"stage {stage}, {settings.schedule}: peak {live.most} = {live.most / predicted.total:.2f} x predicted"
    )
    assert live.most <= 1.1 * predicted.total
    assert live.most >= 0.5 * predicted.total
