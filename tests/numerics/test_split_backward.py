"""Every way through a layer's backward leaves the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devices import DEVICE, DTYPE, arange
from lemix_stage_worker.activation_memory import SavedTensors
from lemix_stage_worker.layer_passes import LayerPass
from lemix_stage_worker.model.scoring import NO_TARGET, loss_sum
from numerics.microbatches import Row, Way, examples, in_halves, learn, loaded_stages, packed, whole
from numerics.subjects import Subject


def _rows(subject: Subject) -> list[Row]:
    """Two microbatches, so that gradients are added to others."""
    rows = examples(subject.source.vocab_size)
    return [packed(rows), packed(rows[:2])]


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", [whole, in_halves])
def test_every_way_back_leaves_the_same_bits(
    subject: Subject, num_stages: int, way: Way, *, recompute: bool
) -> None:
    """Whole or in halves, from kept activations or computed again: losses and all gradients are equal."""
    rows = _rows(subject)
    expected = learn(loaded_stages(subject.source, num_stages, DTYPE), rows)
    stages = loaded_stages(subject.source, num_stages, DTYPE)
    found = learn(stages, rows, way=way, recompute=recompute)
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])] == []
    assert all(gradient.is_contiguous() for gradient in found[1].values())


def test_the_gradients_are_autograd_s(subject: Subject) -> None:
    """To rounding: products are added in place, where autograd computes each and then adds it."""
    rows = _rows(subject)
    (stage,) = loaded_stages(subject.source, 1, torch.float64)
    _, found = learn([stage], rows)
    for leaf in stage.leaves().values():
        leaf.grad = None
    num_targets = sum(int((row.targets != NO_TARGET).sum()) for row in rows)
    for row in rows:
        positions_T = torch.cat([arange(length) for length in row.lengths])
        loss = loss_sum(stage, stage(row.ids, positions_T)[0], row.targets[0]) / num_targets
        torch.autograd.backward(loss)
    expected = {name: leaf.grad for name, leaf in stage.leaves().items() if leaf.grad is not None}
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_between_the_halves_less_is_held_than_before(subject: Subject) -> None:
    """What waits for the weights' half, gradients included, is less than what the forward kept; then nothing is."""
    (stage,) = loaded_stages(subject.source, 1, torch.float32)
    row = packed(examples(subject.source.vocab_size))
    parameters = [*stage.leaves().values(), *stage.base.buffers()]
    layers = LayerPass(stage.parts()[1:], row.lengths)
    saved = SavedTensors()
    with saved.counting():
        for _ in layers.forward(torch.ones(1, sum(row.lengths), subject.source.hidden_size, device=DEVICE)):
            pass
    kept = saved.bytes_beside(parameters)
    for _ in layers.input_gradient(torch.ones_like(layers.output)):
        pass
    assert 0 < _noted_bytes(layers, parameters) < kept
    for _ in layers.weight_gradient():
        pass
    assert _noted_bytes(layers, parameters) == 0


def _noted_bytes(layers: LayerPass, parameters: list[Tensor]) -> int:
    """All that the notes of a pass hold."""
    held = SavedTensors()
    for graph in layers._halves:
        for _, add in graph.notes._notes:
            for cell in add.__closure__ or ():
                held.add(cell.cell_contents)
    return held.bytes_beside(parameters)
