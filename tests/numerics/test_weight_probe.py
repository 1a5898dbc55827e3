"""What layers answer to a fixed input: the same in every cut, another thing when a weight was tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lemix_common.errors import WeightsDamaged
from lemix_stage_worker.hosted_stage import build_template, stage_of
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.weight_probe import check_answers, probe
from numerics.subjects import Subject

HERE = Path("checkpoint")


def stage(subject: Subject, stages: int, index: int, changes: dict[str, Tensor] | None = None) -> StageModel:
    """One stage of a cut, with some of its tensors replaced."""
    template = build_template(subject.source, index, cut_model(subject.source, stages))
    tensors = subject.source.read(template.parameter_names())
    return stage_of(subject.source, template, tensors | (changes or {}))


def test_layers_answer_alike_in_every_cut(subject: Subject) -> None:
    """So that a checkpoint can be checked by other stages than those that wrote it."""
    whole = probe(stage(subject, 1, 0))
    assert sorted(whole) == list(range(subject.source.num_layers))
    for stages in (2, 3):
        for index in range(stages):
            check_answers(stage(subject, stages, index), whole, HERE)


def test_a_transposed_weight_is_found(subject: Subject) -> None:
    """Of whatever square matrix of whatever layer, which the refusal names; shapes and hashes say nothing of it."""
    model = stage(subject, 1, 0)
    sealed = probe(model)
    check_answers(model, sealed, HERE)
    square = [
        leaf.source
        for leaf in model.all_leaves()
        if leaf.parameter.dim() == 2 and leaf.parameter.shape[0] == leaf.parameter.shape[1]
    ]
    assert square
    for name in square:
        values = subject.source.read([name])[name]
        changed = stage(subject, 1, 0, {name: values.T.contiguous()})
        with pytest.raises(
            WeightsDamaged, match=f"layer {layer_of(name)} in checkpoint computes something else"
        ):
            check_answers(changed, sealed, HERE)


def test_layers_that_changed_places_are_found(subject: Subject) -> None:
    """Each has all of another one's weights."""
    model = stage(subject, 1, 0)
    sealed, last = probe(model), subject.source.num_layers - 1
    swapped: dict[str, Tensor] = {}
    for name in model.parameter_names():
        for one, other in ((0, last), (last, 0)):
            marked = name.replace(f".{one}.", f".{other}.", 1)
            if marked != name:
                swapped[name] = subject.source.read([marked])[marked]
    assert swapped
    with pytest.raises(WeightsDamaged, match="layer 0 "):
        check_answers(stage(subject, 1, 0, swapped), sealed, HERE)


def test_what_is_not_a_number_is_found(subject: Subject) -> None:
    """Although it compares with nothing."""
    model = stage(subject, 1, 0)
    sealed = probe(model)
    name = model.parameter_names()[-1]
    broken = torch.full_like(subject.source.read([name])[name], torch.nan)
    with pytest.raises(WeightsDamaged):
        check_answers(stage(subject, 1, 0, {name: broken}), sealed, HERE)


def layer_of(name: str) -> int:
    """The number in a parameter's global name."""
    return int(next(part for part in name.split(".") if part.isdecimal()))
