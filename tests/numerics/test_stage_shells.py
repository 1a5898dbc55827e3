"""Stages as modules: names, sharing, shells, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from devices import DEVICE, arange
from lemix_common.errors import ModelError
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.self_check import build_stages, run_stages
from lemix_stage_worker.model.stage import StageCut, build_stage
from numerics.subjects import Subject

POSITIONS_T = arange(24)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_every_tensor_is_needed_by_one_stage_but_a_tied_one_by_two(subject: Subject, num_stages: int) -> None:
    """The stages' names are the checkpoint's, complete, and overlap only in a tied embedding."""
    cuts = cut_model(subject.source, num_stages)
    stages = [build_stage(subject.source, StageCut(stage, num_stages, cut)) for stage, cut in enumerate(cuts)]
    count = Counter(name for stage in stages for name in stage.parameter_names())
    twice = {subject.source.embedding_name} if subject.source.is_tied and num_stages > 1 else set()
    assert count == {name: 2 if name in twice else 1 for name in subject.source.parameter_names}
    assert [stage.is_first for stage in stages] == [True] + [False] * (num_stages - 1)
    assert [stage.is_last for stage in stages] == [False] * (num_stages - 1) + [True]


def test_the_stages_bytes_are_the_tensors_bytes(subject: Subject) -> None:
    """`weight_bytes` is what `read` gives, known before it is read; a tied pair on one stage counts once."""
    for num_stages in (1, 3):
        cuts = cut_model(subject.source, num_stages)
        for index, layers in enumerate(cuts):
            stage = build_stage(subject.source, StageCut(index, num_stages, layers))
            tensors = subject.source.read(stage.parameter_names())
            assert stage.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_building_a_stage_allocates_and_draws_nothing(subject: Subject) -> None:
    """A stage is built without values (on the meta device) and leaves the random generator alone."""
    state = torch.random.get_rng_state()
    stage = build_stage(subject.source, StageCut(0, 2, range(3)))
    assert all(leaf.is_meta for leaf in stage.leaves().values())
    assert not any(buffer.is_meta for buffer in stage.base.buffers())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loading_copies_nothing(subject: Subject) -> None:
    """Shells of one stage share the tensors they are given; what training writes, it writes to tensors of its own."""
    stage = build_stages(subject.source, cut_model(subject.source, 2))[0]
    tensors = subject.source.read(stage.parameter_names())
    shells = [stage.shell(), stage.shell()]
    for shell in shells:
        shell.load(tensors)
    for name, tensor in tensors.items():
        assert {shell.leaves()[name].data_ptr() for shell in shells} == {tensor.data_ptr()}


@torch.no_grad()
def test_shells_are_independent_of_each_other(subject: Subject) -> None:
    """Served, draining and training weights live side by side: loading one changes no other."""
    stages = build_stages(subject.source, cut_model(subject.source, 2))
    expected = run_stages(stages, subject.ids, POSITIONS_T)
    others = [stage.shell() for stage in stages]
    for other in others:
        tensors = subject.source.read(other.parameter_names())
        other.load({name: tensor + 1 for name, tensor in tensors.items()})
    assert not torch.equal(run_stages(others, subject.ids, POSITIONS_T), expected)
    assert torch.equal(run_stages(stages, subject.ids, POSITIONS_T), expected)


@torch.no_grad()
def test_parts_follow_what_is_loaded_into_their_stage(subject: Subject) -> None:
    """Parts made once stay valid when the weights move on."""
    stage = build_stages(subject.source, [range(subject.source.num_layers)])[0]
    parts = stage.parts(2)
    tensors = subject.source.read(stage.parameter_names())
    stage.load({name: tensor * 2 for name, tensor in tensors.items()})
    whole = run_stages([stage], subject.ids, POSITIONS_T)
    assert torch.equal(run_stages(parts, subject.ids, POSITIONS_T), whole)
    named = [name for part in parts for name in part.leaves()]
    assert named == list(stage.leaves())


def test_a_load_that_cannot_work_changes_nothing(subject: Subject) -> None:
    """A missing tensor or a wrong shape is named, and the stage keeps its values."""
    stage = build_stages(subject.source, cut_model(subject.source, 2))[0]
    before = dict(stage.leaves())
    tensors = subject.source.read(stage.parameter_names())
    last = stage.parameter_names()[-1]
    with pytest.raises(ModelError, match=f"{last}, which is missing"):
        stage.load({name: tensor for name, tensor in tensors.items() if name != last})
    with pytest.raises(ModelError, match=f"{last} has shape"):
        stage.load({**tensors, last: torch.zeros(1, 1, 1)})
    assert all(stage.leaves()[name] is leaf for name, leaf in before.items())


@pytest.mark.parametrize(
    "cut",
    [
        StageCut(0, 2, range(0)),
        StageCut(0, 2, range(1, 3)),
        StageCut(0, 2, range(99)),
        StageCut(1, 2, range(2, 4)),
        StageCut(1, 3, range(4)),
        StageCut(0, 1, range(2)),
        StageCut(1, 3, range(1, 4, 2)),
    ],
    ids=str,
)
def test_a_cut_of_another_model_is_refused(subject: Subject, cut: StageCut) -> None:
    """Empty or impossible runs of layers, and ends that aren't ends, are refused by name."""
    with pytest.raises(ModelError, match=f"stage {cut.stage} of {cut.stages} can't have layers"):
        build_stage(subject.source, cut)


def test_only_the_last_stage_has_a_head(subject: Subject) -> None:
    """Asking another one for logits is a mistake of ours, not the user's."""
    first = build_stages(subject.source, cut_model(subject.source, 2))[0]
    with pytest.raises(ValueError, match="no head"):
        first.logits(torch.zeros(1, 1, subject.source.hidden_size, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_building_leaves_torchs_default_type_alone(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """It is the process's: two threads that set it and back would leave it wrong, and others see it."""
    seen = set[torch.dtype]()
    monkeypatch.setattr(torch, "set_default_dtype", seen.add)
    source = replace(subject.source, dtype=dtype)
    stage = build_stage(source, StageCut(0, 1, range(source.num_layers)))
    assert seen <= {torch.get_default_dtype()}
    assert {leaf.parameter.dtype for leaf in stage.all_leaves()} == {dtype}
    assert {buffer.dtype for buffer in stage.base.buffers() if buffer.is_floating_point()} <= {torch.float32}
