"""One stage as a worker hosts it, and the passes that a worker has it compute: the same functions, called one by one.

What arrives from other stages is made up: how long a product takes doesn't depend on its numbers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lemix_common.costs import RowSteps
from lemix_common.ids import BASE_VERSION
from lemix_common.messages import Frame, RunForward
from lemix_common.sampling import Sampling
from lemix_common.store.training import PlannedStep
from lemix_stage_worker.activation_memory import TrainingWay, predict_memory
from lemix_stage_worker.batching import Wants
from lemix_stage_worker.device import wait_for
from lemix_stage_worker.forwarding import Forwarding
from lemix_stage_worker.hosted_stage import (
    BASE_DIRECTORY,
    HostedStage,
    OpenedItem,
    build_template,
    load_version,
    training_on,
)
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.packed_linear import ROW_STEPS, pack_stage
from lemix_stage_worker.model.paged_attention import key_value_shape
from lemix_stage_worker.model.sampling import Chooser
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.profiling.grid import REFERENCE_SHARE, Cell
from lemix_stage_worker.ready_queue import Task
from lemix_stage_worker.step_work import Example, pack
from lemix_stage_worker.tensors import to_buffer
from lemix_stage_worker.training_state import TrainingState

_VERSION: Final = str(BASE_VERSION)
_STEP: Final = PlannedStep(
    run="profile",
    step=1,
    items=("example",),
    cuts=(1,),
    shards=(0,),
    reference_tokens=1_000_000,
    learning_rate=1e-9,
    weight_decay=0.0,
    seed=0,
)
"""It changes next to nothing, so that weights stay numbers however often it is taken."""


@dataclass(frozen=True, slots=True)
class Took:
    """How long a pass took."""

    wall_s: float
    thread_s: float
    """Of the processor's time, what this thread had: less than the wall's where others had it too."""


class Alone:
    """A worker around a stage that has no neighbours: what is sent is made ready to travel and dropped."""

    def send(self, _host: HostedStage, _stage: int, _frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        for tensor in tensors:
            to_buffer(tensor)

    def schedule(self, _task: Task) -> None:
        raise AssertionError("nothing arrives here")


@dataclass(eq=False)
class Subject:
    """A hosted stage under measurement."""

    host: HostedStage
    load_s: float
    _forwarding: Forwarding = field(default_factory=lambda: Forwarding(Alone()))
    _hidden_1TD: Tensor = field(init=False)
    """As many rows as the longest pass has, on the host, where they arrive; gradients are as good."""
    _ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        host, num_tokens = self.host, self.cache_tokens
        config = host.template.base.config
        generator = torch.Generator().manual_seed(0)
        shape = (1, num_tokens, int(config.hidden_size))
        self._hidden_1TD = torch.randn(shape, generator=generator).to(host.source.dtype)
        self._ids = torch.randint(int(config.vocab_size), (num_tokens,), generator=generator).tolist()
        cache = host.open_cache()
        for tensor in (*cache.keys_GSK, *cache.values_GSK):
            tensor.normal_()  # memory that was never written to is read faster than it will be
        cache.versions[:] = [_VERSION] * len(cache.versions)
        for number in range(host.num_blocks):
            host.opened[number] = OpenedItem(f"item-{number}", 1, Chooser(Sampling(), 1))

    @property
    def cache_tokens(self) -> int:
        return self.host.num_blocks * BLOCK_TOKENS

    # ---- the passes
    def run(self, cell: Cell) -> dict[str, Took]:
        """Compute one cell; by the kind of span that a worker reports, how long it took."""
        if cell.kind == "train":
            return self._train(cell.lengths)
        name = "decode" if cell.kind == "decode" else "prefill"
        return {name: self._serve(cell)}

    def optimize(self) -> Took:
        """One optimizer step on the gradients of the passes before, and what else a step does once."""
        state = self._training

        def step() -> None:
            found = state.newest.take_gradients()
            gradients = dict(zip(state.newest.leaves(), found, strict=True))
            state.squares(gradients)
            _exhaust(state.apply(gradients, _STEP, scale=1.0))

        return self._timed(step)

    # ---- what isn't time
    @property
    def row_steps(self) -> RowSteps:
        """How the rows of an iteration are rounded."""
        return ROW_STEPS if self.host.versions[_VERSION].is_packed else ()

    @property
    def kv_token_bytes(self) -> int:
        heads, size = key_value_shape(self.host.template.base.config)
        return 2 * len(self.host.template.cut.layers) * heads * size * self.host.source.dtype.itemsize

    def activation_bytes(self, cell: Cell) -> int:
        """What is kept of a microbatch from its forward to its backward."""
        return self._training.newest.activations.held(cell.lengths)

    @property
    def training_bytes(self) -> int:
        """Gradients and the optimizer's state."""
        state = self._training
        needed = predict_memory(state.model, state.newest.activations, [(1,)], TrainingWay(held=1))
        return needed.masters + needed.moments + needed.gradients

    # ---- how
    @property
    def _training(self) -> TrainingState:
        assert self.host.training is not None
        return self.host.training

    def _serve(self, cell: Cell) -> Took:
        lengths, host = cell.lengths, self.host
        is_decode = cell.kind == "decode"
        tables = [num_blocks_for(length) for length in lengths]
        frame = RunForward(
            node=0,
            stage=host.stage,
            epoch=0,
            iteration=0,
            version=_VERSION,
            numbers=tuple(range(len(lengths))),
            starts=tuple(length - 1 if is_decode else 0 for length in lengths),
            lengths=(1,) * len(lengths) if is_decode else lengths,
            tables=tuple(tables),
            wants=(int(Wants.SCORES if cell.kind == "score" else Wants.TOKEN),) * len(lengths),
            slowest_s=0.0,
        )
        blocks_N = torch.arange(sum(tables), dtype=torch.int32)
        scored = [pack([self._example(length)], 0.0).targets_BT[0] for length in lengths]
        targets_T = torch.cat(scored) if cell.kind == "score" else torch.zeros(0, dtype=torch.int64)
        source = self._source(cell.tokens)
        return self._timed(lambda: self._forwarding.compute(host, frame, (source, blocks_N, targets_T)))

    def _train(self, lengths: Sequence[int]) -> dict[str, Took]:
        state, device = self._training, self.host.device
        row = pack([self._example(length) for length in lengths], 0.0)
        source = self._source(sum(lengths)).to(device)
        targets_BT = row.targets_BT.to(device)
        returned_BTD = self._hidden_1TD[:, : sum(lengths)].to(device)
        layers = LayerPass(state.newest.parts, row.lengths)
        head: HeadPass | None = None

        def backward() -> None:
            nonlocal head
            gradient_BTD = returned_BTD
            if self.host.is_last:
                head = HeadPass(state.model, layers.output, row.lengths)
                _exhaust(head.run(targets_BT, _STEP.reference_tokens))
                gradient_BTD = head.gradient_BTD
            _exhaust(layers.backward(gradient_BTD))
            if head is not None:
                head.add_gradients()
            state.newest.end_microbatch()

        forward = self._timed(lambda: _exhaust(layers.forward(source)))
        return {"training_forward": forward, "training_backward": self._timed(backward)}

    def _source(self, num_tokens: int) -> Tensor:
        """What a pass begins with, where it arrives."""
        if self.host.is_first:
            return torch.tensor([self._ids[:num_tokens]])
        return self._hidden_1TD[:, :num_tokens].contiguous()

    def _example(self, length: int) -> Example:
        num_reference = max(1, length // REFERENCE_SHARE)
        ids = tuple(self._ids[:length])
        return ids[: length - num_reference], ids[length - num_reference :]

    def _timed(self, act: Callable[[], object]) -> Took:
        device = self.host.device
        wait_for(device)
        thread, wall = time.thread_time(), time.perf_counter()
        act()
        wait_for(device)
        return Took(time.perf_counter() - wall, time.thread_time() - thread)


def host_stage(source: ModelSource, stage: int, layers: tuple[range, ...], *, cache_tokens: int) -> Subject:
    """A stage with its weights, packed to serve and unpacked to train, as a worker loads it."""
    began = time.perf_counter()
    template = build_template(source, stage, layers)
    base = load_version(source, template, BASE_DIRECTORY)
    served = pack_stage(base)
    load_s = time.perf_counter() - began
    host = HostedStage(
        node=0,
        stage=stage,
        stages=len(layers),
        source=source,
        template=template,
        versions={_VERSION: served},
        training=training_on(base, template, BASE_VERSION),
        num_blocks=num_blocks_for(cache_tokens),
    )
    gc.collect()
    return Subject(host, load_s)


def _exhaust(steps: Iterator[None]) -> None:
    for _ in steps:
        pass
