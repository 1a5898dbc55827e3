"""Stages compute what the whole model computes, backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from devices import DEVICE, DTYPE, arange
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.self_check import build_stages, gradients, run_stages
from numerics.subjects import Subject


@pytest.fixture
def expected(subject: Subject) -> Iterator[dict[str, Tensor]]:
    """The whole model's gradients."""
    torch.autograd.backward(_loss_of(subject.whole(subject.ids).logits, subject.ids))
    yield {name: leaf.grad for name, leaf in subject.whole.named_parameters() if leaf.grad is not None}
    subject.whole.zero_grad()


def _loss_of(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
    )


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_the_gradients_are_the_whole_models_bit_for_bit(
    subject: Subject, expected: dict[str, Tensor], num_stages: int
) -> None:
    """Every parameter's gradient; a tied one's is the embedding's plus the head's."""
    stages = build_stages(subject.source, cut_model(subject.source, num_stages))
    logits_BTV = run_stages(stages, subject.ids, arange(24))
    torch.autograd.backward(_loss_of(logits_BTV, subject.ids))
    _assert_equal(gradients(stages, subject.source.embedding_name), expected)


@pytest.mark.parametrize("in_parts", [False, True], ids=["stages", "single layers"])
def test_gradients_pass_detached_borders_unchanged(
    subject: Subject, expected: dict[str, Tensor], *, in_parts: bool
) -> None:
    """What is received and sent as plain tensors, stage by stage or layer by layer, adds up to the same bits."""
    stages = build_stages(subject.source, cut_model(subject.source, 3))
    runs = [part for stage in stages for part in stage.parts()] if in_parts else list(stages)
    arriving, leaving = [subject.ids], []
    for run in runs:
        leaving.append(run(arriving[-1], arange(24)))
        arriving.append(leaving[-1].detach().requires_grad_())
    torch.autograd.backward(_loss_of(runs[-1].logits(arriving[-1]), subject.ids))
    for received, sent in reversed(list(zip(arriving[1:], leaving, strict=True))):
        torch.autograd.backward(sent, received.grad)
    _assert_equal(gradients(stages, subject.source.embedding_name), expected)


def test_a_tied_head_is_a_leaf_of_its_own(subject: Subject) -> None:
    """Embedding and head have two gradient buffers even on one stage; without tying there is nothing to sum."""
    (stage,) = build_stages(subject.source, cut_model(subject.source, 1))
    torch.autograd.backward(_loss_of(run_stages([stage], subject.ids, arange(24)), subject.ids))
    embedding, head = stage.leaves()[subject.source.embedding_name], stage.leaves()["lm_head.weight"]
    assert stage.tied_head == subject.source.is_tied
    assert stage.tied_to == (subject.source.embedding_name if subject.source.is_tied else None)
    assert torch.equal(embedding, head) == subject.source.is_tied
    assert embedding.grad is not None
    assert head.grad is not None
    assert not torch.equal(embedding.grad, head.grad)


def test_a_stage_can_be_trained_through_without_training_it(subject: Subject) -> None:
    """Weights that aren't trainable get no gradients, and what arrives still gets its own."""
    last = build_stages(subject.source, cut_model(subject.source, 2))[-1]
    last.load(subject.source.read(last.parameter_names()), trainable=False)
    hidden_BTD = torch.ones(1, 4, subject.source.hidden_size, dtype=DTYPE, device=DEVICE, requires_grad=True)
    torch.autograd.backward(last.logits(last(hidden_BTD, arange(4))).sum())
    assert hidden_BTD.grad is not None
    assert {leaf.grad for leaf in last.leaves().values()} == {None}
