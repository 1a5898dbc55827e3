"""Every way through a layer's backward leaves the same bits."""

from __future__ import annotations

import gc
from itertools import chain

import pytest
import torch

from lemix_stage_worker.activation_memory import SavedTensors
from lemix_stage_worker.layer_passes import LayerPass
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.split_backward import _Kept
from numerics.microbatches import Row, Way, examples, in_halves, learn, loaded_stages, packed, whole
from numerics.subjects import Subject


def _rows(subject: Subject) -> list[Row]:
    """Two microbatches, so that gradients are added to others."""
    rows = examples(subject.source.vocab_size)
    return [packed(rows), packed(rows[:2])]


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("way", "splits"), [(whole, False), (in_halves, False), (in_halves, True), (whole, True)]
)
def test_every_way_back_leaves_the_same_bits(
    subject: Subject, num_stages: int, way: Way, *, recompute: bool, splits: bool
) -> None:
    """Whole or in halves, from kept activations or computed again: losses and all gradients are equal."""
    rows = _rows(subject)
    expected = learn(loaded_stages(subject.source, num_stages, torch.float32), rows)
    stages = loaded_stages(subject.source, num_stages, torch.float32)
    found = learn(stages, rows, way=way, recompute=recompute, splits=splits)
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])] == []
    assert all(gradient.is_contiguous() for gradient in found[1].values())


def test_between_the_halves_nothing_is_held_that_was_not_before(subject: Subject) -> None:
    """What waits for the weights' half, the gradients that arrived included, is less than what the forward kept."""
    (stage,) = loaded_stages(subject.source, 1, torch.float32)
    row = packed(examples(subject.source.vocab_size))
    layers = LayerPass(stage.parts()[1:], row.lengths, splits=True)
    for _ in layers.forward(torch.ones(1, sum(row.lengths), subject.source.hidden_size)):
        pass
    before = _held_bytes(stage, layers)
    for _ in layers.input_gradient(torch.ones_like(layers.output)):
        pass
    assert 0 < _held_bytes(stage, layers) < before
    for _ in layers.weight_gradient():
        pass
    assert _held_bytes(stage, layers) == 0


def _held_bytes(stage: StageModel, layers: LayerPass) -> int:
    """All that graphs of this process have on their shelves, and what waits at this pass's joins."""
    held = SavedTensors()
    for kept in gc.get_objects():
        if type(kept) is _Kept and kept.tensor is not None:
            held.add(kept.tensor)
    for gradient in chain.from_iterable(join.gradients for graph in layers._halves for join in graph.joins):
        if gradient is not None:
            held.add(gradient)
    return held.bytes_beside([*stage.leaves().values(), *stage.base.buffers()])
