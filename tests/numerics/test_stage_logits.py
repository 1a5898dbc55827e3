"""Stages compute what the whole model computes, forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from devices import DEVICE, arange, within
from lemix_common.partition import cut_layers
from lemix_stage_worker.model.self_check import build_stages, relative_difference, run_stages
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.model.weights import open_weights
from numerics.subjects import Subject


def _equal_cut(subject: Subject, stages: int) -> tuple[range, ...]:
    return cut_layers([1.0] * subject.source.num_layers, stages)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@torch.no_grad()
def test_the_logits_are_the_whole_models_bit_for_bit(subject: Subject, num_stages: int) -> None:
    """However many stages there are, not one bit of a logit differs."""
    stages = build_stages(subject.source, _equal_cut(subject, num_stages))
    logits_BTV = run_stages(stages, subject.ids, arange(subject.ids.shape[1]))
    assert torch.equal(logits_BTV, subject.whole(subject.ids).logits)


@torch.no_grad()
def test_it_does_not_matter_where_the_cut_is(subject: Subject) -> None:
    """Every cut into two stages, however uneven, gives the same bits."""
    expected = subject.whole(subject.ids).logits
    num_layers = subject.source.num_layers
    for border in range(1, num_layers):
        stages = build_stages(subject.source, [range(border), range(border, num_layers)])
        assert torch.equal(run_stages(stages, subject.ids, arange(24)), expected), border


@pytest.mark.parametrize("layers_per_part", [1, 2])
@torch.no_grad()
def test_a_stage_run_in_parts_gives_the_same_bits(subject: Subject, layers_per_part: int) -> None:
    """Training may stop between any two layers of a stage."""
    stages = build_stages(subject.source, _equal_cut(subject, 2))
    parts = [part for stage in stages for part in stage.parts(layers_per_part)]
    logits_BTV = run_stages(parts, subject.ids, arange(24))
    assert torch.equal(logits_BTV, subject.whole(subject.ids).logits)


@torch.no_grad()
def test_rows_may_have_positions_of_their_own(subject: Subject) -> None:
    """Positions can be given once for all rows or for each row."""
    stages = build_stages(subject.source, _equal_cut(subject, 2))
    positions_T = arange(24)
    once = run_stages(stages, subject.ids, positions_T)
    assert torch.equal(run_stages(stages, subject.ids, positions_T.expand(2, -1)), once)


@torch.no_grad()
def test_sequences_packed_into_one_row_do_not_see_each_other(subject: Subject) -> None:
    """A packed row gives each sequence the logits it has alone (other kernels, so not the same bits)."""
    stages = build_stages(subject.source, _equal_cut(subject, 3))
    lengths = [5, 12, 7]
    packed = run_stages(stages, subject.ids[:1], torch.cat([arange(length) for length in lengths]))
    alone = torch.split_with_sizes(subject.ids[:1], lengths, dim=1)
    for ids, found in zip(alone, torch.split_with_sizes(packed, lengths, dim=1), strict=True):
        assert relative_difference(found, subject.whole(ids).logits) <= within(1e-6)


@torch.no_grad()
def test_a_published_folder_of_shards_has_the_same_names(subject: Subject, tmp_path: Path) -> None:
    """Weights saved stage by stage under global names load into any other cut."""
    for stage in build_stages(subject.source, _equal_cut(subject, 3)):
        own = {name: leaf.detach() for name, leaf in stage.leaves().items()}
        if stage.tied_head:
            del own["lm_head.weight"]
        save_file(own, tmp_path / f"stage-{stage.cut.stage}.safetensors")
    published = open_weights(tmp_path)
    stages = build_stages(subject.source, _equal_cut(subject, 2))
    shells = [stage.shell() for stage in stages]
    for shell in shells:
        values = published.read(shell.parameter_names())
        shell.load({name: tensor.to(DEVICE) for name, tensor in values.items()})
    positions_T = arange(24)
    expected = run_stages(stages, subject.ids, positions_T)
    assert torch.equal(run_stages(shells, subject.ids, positions_T), expected)


@torch.no_grad()
def test_a_model_can_be_opened_in_another_type(model_folder: Path) -> None:
    """`dtype` converts the parameters as they are read, and the stages compute in it."""
    source = open_model(model_folder, dtype=torch.bfloat16, device=DEVICE)
    stages = build_stages(source, cut_layers([1.0] * source.num_layers, 2))
    assert {leaf.dtype for leaf in stages[0].leaves().values()} == {torch.bfloat16}
    assert run_stages(stages, torch.tensor([[3, 4, 5]], device=DEVICE), arange(3)).dtype == torch.bfloat16
