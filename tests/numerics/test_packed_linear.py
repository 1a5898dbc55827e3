"""Served stages with rearranged matrices compute what plain ones do, whoever shares the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from devices import IS_GPU, IS_HALF
from lemix_stage_worker.model import packed_linear
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.packed_linear import PackedLinear, can_pack, pack_stage
from lemix_stage_worker.model.self_check import build_stages, relative_difference, run_stages
from numerics.subjects import Subject

HAS_KERNEL = can_pack(torch.zeros(1)) and not IS_GPU and not IS_HALF
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="torch has no rearranged products here")


@needs_kernel
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 61), (48, 32), (512, 1376)])
@torch.no_grad()
def test_a_row_does_not_depend_on_how_many_there_are(inputs: int, outputs: int) -> None:
    """Alone, at any place among 2 to 64, or in a long prompt: the same but for rounding, on every processor."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(outputs, inputs, generator=generator)
    packed = PackedLinear(weight_NK, torch.randn(outputs, generator=generator))
    rows_TK = torch.randn(256, inputs, generator=generator)
    expected_TN = packed(rows_TK)
    for count in (*range(1, 20), 31, 32, 33, 64, 100):
        for start in (0, 1, 256 - count):
            found = packed(rows_TK[start : start + count].clone())
            assert relative_difference(found, expected_TN[start : start + count]) < 1e-6, (count, start)


@needs_kernel
@pytest.mark.parametrize("num_stages", [1, 2, 5])
@torch.no_grad()
def test_packed_stages_give_the_plain_ones_logits(subject: Subject, num_stages: int) -> None:
    """Within 1e-5 of the plain stages and of the whole model, for every family."""
    stages = build_stages(subject.source, cut_model(subject.source, num_stages))
    packed = [pack_stage(stage) for stage in stages]
    positions = torch.arange(subject.ids.shape[1])
    found = run_stages(packed, subject.ids, positions)
    assert relative_difference(found, run_stages(stages, subject.ids, positions)) < 1e-5
    assert relative_difference(found, subject.whole(subject.ids).logits) < 1e-5
    matrices = [module for stage in packed for module in stage.base.modules() if hasattr(module, "weight")]
    assert not any(isinstance(module, nn.Linear) for module in matrices)
    assert all(stage.is_packed for stage in packed)


@needs_kernel
@torch.no_grad()
def test_packing_a_stage_leaves_the_one_it_was_made_of(subject: Subject) -> None:
    """Training may share its tensors: they stay where and what they are, and what isn't a matrix is shared on."""
    (stage,) = build_stages(subject.source, cut_model(subject.source, 1))
    positions = torch.arange(subject.ids.shape[1])
    leaves = stage.leaves()
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    logits = run_stages([stage], subject.ids, positions)
    packed = pack_stage(stage)
    assert packed is not stage
    assert not stage.is_packed
    after = stage.leaves()
    assert all(after[name] is leaf and torch.equal(leaf, before[name]) for name, leaf in leaves.items())
    assert torch.equal(run_stages([stage], subject.ids, positions), logits)
    shared = {id(leaf) for leaf in leaves.values()}
    assert all(id(parameter) in shared for parameter in packed.base.parameters()), "nothing is held twice"


@torch.no_grad()
def test_without_the_kernel_stages_stay_as_they_are(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other builds of torch, and for other types than float32, what is served is the plain stage."""
    (stage,) = build_stages(subject.source, cut_model(subject.source, 1))
    for dtype in (torch.bfloat16, torch.float64):
        other = stage.shell()
        other.load({name: subject.source.read([name])[name].to(dtype) for name in stage.parameter_names()})
        assert pack_stage(other) is other
    monkeypatch.setattr(packed_linear, "_multiply", None)
    assert pack_stage(stage) is stage
