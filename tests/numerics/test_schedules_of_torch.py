"""Our schedules do what those of `torch.distributed.pipelining` do, in the same order on every worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lemix_common.schedules import (
    Schedule,
    gpipe,
    interleaved,
    one_forward_one_backward,
    zero_bubble,
)

pipelining: Any = pytest.importorskip("torch.distributed.pipelining.schedules")

SIZES = [(1, 1), (2, 2), (3, 4), (4, 4), (4, 8), (4, 10), (6, 12)]
"""Workers and microbatches that divide into equal rounds, which torch wants where a worker can have several stages."""


class RecordingStage:
    """A stage for torch's schedules that computes and sends nothing and notes what it is told to do."""

    has_backward = True
    submod = torch.nn.Identity()

    def __init__(self, stage: int, stages: int, workers: int) -> None:
        self.stage_index, self.num_stages = stage, stages
        self.group_rank, self.group_size = stage % workers, workers
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.told: list[str] = []

    def forward_one_chunk(self, microbatch: int, *_arguments: Any, **_options: Any) -> None:
        self.told.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch: int, **_options: Any) -> None:
        self.told.append(f"{self.stage_index}B{microbatch}")

    def no_tensors(self, _microbatch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_tensors

    def perform_reduce_grad(self, _divisor: int) -> None: ...


def run_by_torch(kind: Any, stages: int, microbatches: int) -> list[list[str]]:
    """What torch's schedule of one stage a worker tells each stage.

    Not what it prints: in torch 2.13 the last stage of a printed 1F1B has F1 to F4 where F0 to F3 are run.
    """
    told = []
    for index in range(stages):
        stage = RecordingStage(index, stages, stages)
        schedule = kind(stage, microbatches)
        schedule._initialize_stage = lambda *_: None
        schedule._step_microbatches()
        told.append(stage.told)
    return told


def planned_by_torch(kind: Any, stages: int, microbatches: int, workers: int) -> list[list[str]]:
    """The orders that torch's schedule of several stages a worker has, idle slots left out."""
    hosted = [RecordingStage(stage, stages, workers) for stage in range(0, stages, workers)]
    order = kind(hosted, microbatches).pipeline_order
    return [[str(action) for action in order[worker] if action is not None] for worker in range(workers)]


def ours(schedule: Schedule) -> list[list[str]]:
    return [[str(action) for action in order] for order in schedule.orders]


@pytest.mark.parametrize(("stages", "microbatches"), [*SIZES, (4, 2)])
def test_gpipe_is_torchs(stages: int, microbatches: int) -> None:
    """All forwards, then all backwards, oldest first."""
    assert ours(gpipe(stages, microbatches)) == run_by_torch(pipelining.ScheduleGPipe, stages, microbatches)


@pytest.mark.parametrize(("stages", "microbatches"), [*SIZES, (2, 5)])
def test_1f1b_is_torchs(stages: int, microbatches: int) -> None:
    """Where torch allows it: with at least as many microbatches as stages."""
    theirs = run_by_torch(pipelining.Schedule1F1B, stages, microbatches)
    assert ours(one_forward_one_backward(stages, microbatches)) == theirs


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize(("workers", "microbatches"), [*SIZES, (4, 3)])
def test_interleaved_is_torchs(workers: int, each: int, microbatches: int) -> None:
    """Round by round."""
    theirs = planned_by_torch(pipelining.ScheduleInterleaved1F1B, workers * each, microbatches, workers)
    assert ours(interleaved(workers * each, microbatches, workers=workers)) == theirs


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_zero_bubble_is_torchs(stages: int, microbatches: int) -> None:
    """Its interleaved one, of one stage a worker; torch has no plain one."""
    theirs = planned_by_torch(pipelining.ScheduleInterleavedZeroBubble, stages, microbatches, stages)
    assert ours(zero_bubble(stages, microbatches)) == theirs
