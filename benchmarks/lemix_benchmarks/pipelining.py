"""The peer of `train`: the same model in two processes by `torch.distributed.pipelining`, 1F1B over gloo.

Put together as its documentation has it, from transformers' own layers, cut where LeMix cuts, and helped where that is
fair: fused AdamW, no mask (padding is on the right, where causal attention doesn't see it), the head only on positions
with a target, and shapes known beforehand, so that nothing is inferred while it is measured.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from lemix_benchmarks.batches import Batch, Example, Train, Trained, longest
from lemix_benchmarks.model import read_bench_model
from lemix_common.errors import ClusterError

_IGNORED: Final = -100
_START_TIMEOUT_S: Final = 120.0
_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What the processes are told."""

    folder: Path
    layers: tuple[range, ...]
    """Of each stage."""
    microbatches: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Said:
    """What one process says of some steps."""

    began: float
    """Of the monotonic clock, which the processes share."""
    ended: float
    losses: tuple[float, ...]
    """On the last stage."""


@contextmanager
def running_pipeline(pipeline: Pipeline, directory: Path) -> Iterator[Train]:
    """The processes for the length of a ``with`` block; between calls they wait in a read and compute nothing."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in pipeline.layers]
    processes = [
        spawn.Process(
            target=_run_stage, args=(stage, pipeline, str(directory / "rendezvous"), theirs), daemon=True
        )
        for stage, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    ours = [end for end, _ in pipes]

    def train(batches: Sequence[Batch]) -> Trained:
        for end in ours:
            end.send(tuple(batches))
        said: list[Said] = [_answer(end, _TIMEOUT_S) for end in ours]
        seconds = max(each.ended for each in said) - min(each.began for each in said)
        return Trained(seconds, said[-1].losses)

    try:
        for end in ours:
            _answer(end, _START_TIMEOUT_S)
        yield train
    finally:
        for process, end in zip(processes, ours, strict=True):
            process.kill()
            process.join()
            end.close()


def _answer(end: Connection, timeout_s: float) -> Any:
    try:
        if end.poll(timeout_s):
            return end.recv()
    except EOFError:
        raise ClusterError("a process of torch.distributed.pipelining died: see above") from None
    raise ClusterError(f"torch.distributed.pipelining: no answer within {timeout_s:g} s")


def _run_stage(stage: int, pipeline: Pipeline, rendezvous: str, parent: Connection) -> None:
    """A process: say that it is ready, then run the steps it is told to."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=stage, world_size=len(pipeline.layers)
    )
    trainer = StageTrainer(stage, pipeline)
    distributed.barrier()
    parent.send(None)
    with suppress(EOFError):  # the parent has gone
        while True:
            steps = [PaddedStep.of(batch) for batch in parent.recv()]
            distributed.barrier()
            began = time.monotonic()
            losses = [trainer.step(step) for step in steps]
            parent.send(Said(began, time.monotonic(), tuple(losses)))


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A batch as tensors, every example as long as its longest."""

    ids_BT: Tensor
    targets_BT: Tensor
    num_targets: int

    @classmethod
    def of(cls, batch: Batch) -> PaddedStep:
        """Padding is on the right, and nothing is asked there."""
        rows = [_padded(example, longest(batch)) for example in batch]
        return cls(
            torch.tensor([ids for ids, _ in rows]),
            torch.tensor([targets for _, targets in rows]),
            sum(len(example.reference) for example in batch),
        )


def _padded(example: Example, length: int) -> tuple[list[int], list[int]]:
    """The ids, and at each position the token that should follow it."""
    padding = length - example.num_tokens
    ids = [*example.prompt, *example.reference, *[0] * padding]
    unasked = [_IGNORED] * (len(example.prompt) - 1)
    return ids, [*unasked, *example.reference, _IGNORED, *[_IGNORED] * padding]


class StageModule(nn.Module):
    """A run of a Llama's layers, with the embedding if it is the first and the norm if it is the last.

    The last one's head is applied by the loss, to the positions with a target.
    """

    def __init__(self, model: Any, layers: range) -> None:
        super().__init__()
        base = model.model
        is_last = layers.stop == len(base.layers)
        self.embedding = base.embed_tokens if layers.start == 0 else None
        self.layers = nn.ModuleList(base.layers[index] for index in layers)
        self.norm = base.norm if is_last else nn.Identity()
        self.head = model.lm_head if is_last else None
        self.rotary = base.rotary_emb

    def forward(self, source: Tensor) -> Tensor:
        """From ids_BT or hidden_BTD to hidden_BTD."""
        hidden_BTD = source if self.embedding is None else self.embedding(source)
        positions_BT = torch.arange(source.shape[1])[None]
        cosine_sine = self.rotary(hidden_BTD, positions_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, position_embeddings=cosine_sine)
        normed_BTD: Tensor = self.norm(hidden_BTD)
        return normed_BTD


@dataclass
class StageTrainer:
    """One process's part of the pipeline."""

    stage: int
    pipeline: Pipeline
    num_targets: int = 1
    """Of the step in progress."""
    _schedules: dict[torch.Size, Schedule1F1B] = field(default_factory=dict)
    """By the shape of a step: a stage of theirs has one."""

    def __post_init__(self) -> None:
        model: Any = read_bench_model(self.pipeline.folder).train()
        self.hidden_size = int(model.config.hidden_size)
        self.module = StageModule(model, self.pipeline.layers[self.stage])
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.pipeline.learning_rate,
            weight_decay=self.pipeline.weight_decay,
            fused=True,
        )

    @property
    def is_last(self) -> bool:
        """It has the losses."""
        return self.stage == len(self.pipeline.layers) - 1

    def step(self, step: PaddedStep) -> float:
        """One optimizer step; its loss on the last stage, else 0."""
        self.num_targets = step.num_targets
        schedule = self._schedules.get(step.ids_BT.shape) or self._new_schedule(step.ids_BT.shape)
        losses: list[Tensor] = []
        inputs = (step.ids_BT,) if self.stage == 0 else ()
        outputs: Mapping[str, Any] = {"target": step.targets_BT, "losses": losses} if self.is_last else {}
        schedule.step(*inputs, **outputs, return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(float(loss.detach()) for loss in losses)

    def _new_schedule(self, shape: torch.Size) -> Schedule1F1B:
        rows, length = shape[0] // self.pipeline.microbatches, shape[1]
        hidden_BTD = torch.empty(rows, length, self.hidden_size, device="meta", requires_grad=True)
        ids_BT = torch.empty(rows, length, dtype=torch.long, device="meta")
        stage = PipelineStage(
            self.module,
            self.stage,
            len(self.pipeline.layers),
            torch.device("cpu"),
            input_args=(ids_BT if self.stage == 0 else hidden_BTD,),
            output_args=(hidden_BTD,),
        )
        schedule = Schedule1F1B(stage, self.pipeline.microbatches, loss_fn=self._loss, scale_grads=False)
        self._schedules[shape] = schedule
        return schedule

    def _loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """A microbatch's share of the step's mean over its targets."""
        assert self.module.head is not None
        targets_N = targets_BT.flatten()
        rows_R = (targets_N != _IGNORED).nonzero()[:, 0]
        logits_RV = self.module.head(hidden_BTD.flatten(0, 1).index_select(0, rows_R))
        loss = functional.cross_entropy(logits_RV, targets_N[rows_R], reduction="sum")
        return loss / self.num_targets
