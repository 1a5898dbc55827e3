"""Microbatches on the stages of one process, as workers run them: what they lose and the gradients they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devices import DEVICE
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageCut, StageModel, build_stage

LENGTHS = (7, 12, 5)
"""Of the examples in a row: shorter and longer than the windows of the subjects that have one."""
RARE = 2
"""A token that no example has."""

Way = Callable[[LayerPass, Tensor], None]
"""How a pass goes backwards."""


@dataclass(frozen=True, slots=True)
class Row:
    """One microbatch."""

    ids: Tensor
    """(1, T)."""
    targets: Tensor
    """(1, T)."""
    lengths: tuple[int, ...] = ()


def whole(layers: LayerPass, gradient_BTD: Tensor) -> None:
    """All of the backward at once."""
    for _ in layers.backward(gradient_BTD):
        pass


def in_halves(layers: LayerPass, gradient_BTD: Tensor) -> None:
    """First the input's gradient, then the weights'."""
    for _ in layers.input_gradient(gradient_BTD):
        pass
    for _ in layers.weight_gradient():
        pass


def loaded_stages(source: ModelSource, num_stages: int, dtype: torch.dtype) -> list[StageModel]:
    """Every stage of a model, with values of a precision of its own."""
    stages = []
    for index, layers in enumerate(cut_model(source, num_stages)):
        stage = build_stage(source, StageCut(index, num_stages, layers))
        values = source.read(stage.parameter_names())
        stage.load({name: tensor.to(dtype).clone() for name, tensor in values.items()})
        stages.append(stage)
    return stages


def examples(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """Random examples, each a prompt of two tokens and a reference."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length in lengths:
        ids_BT = torch.randint(RARE + 1, vocab_size, (1, length), generator=generator).to(DEVICE)
        targets_BT = ids_BT.roll(-1)
        targets_BT[0, 0] = targets_BT[0, -1] = NO_TARGET
        rows.append(Row(ids_BT, targets_BT))
    return rows


def packed(rows: Sequence[Row]) -> Row:
    """The same examples in one row."""
    return Row(
        torch.cat([row.ids for row in rows], dim=1),
        torch.cat([row.targets for row in rows], dim=1),
        tuple(row.ids.shape[1] for row in rows),
    )


def learn(
    stages: Sequence[StageModel],
    rows: Sequence[Row],
    *,
    way: Way = whole,
    recompute: bool = False,
) -> tuple[list[float], dict[str, Tensor]]:
    """The examples' losses and every parameter's gradient, after a step of these microbatches."""
    num_targets = sum(int((row.targets != NO_TARGET).sum()) for row in rows)
    losses: list[float] = []
    for row in rows:
        source, passes = row.ids, []
        for stage in stages:
            passes.append(LayerPass(stage.parts(), row.lengths, recompute=recompute))
            for _ in passes[-1].forward(source):
                pass
            source = passes[-1].output
        head = HeadPass(stages[-1], source, row.lengths)
        for _ in head.run(row.targets, num_targets):
            pass
        head.add_gradients()
        losses += head.losses
        gradient_BTD: Tensor | None = head.gradient_BTD
        for layers in reversed(passes):
            assert gradient_BTD is not None
            way(layers, gradient_BTD)
            gradient_BTD = layers.gradient
        assert gradient_BTD is None, "the embedding's input has no gradient"
    found = {name: leaf.grad for stage in stages for name, leaf in stage.leaves().items()}
    return losses, {name: gradient for name, gradient in found.items() if gradient is not None}
