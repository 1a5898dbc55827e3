"""Scores of given continuations, and the training loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devices import DEVICE, IS_GPU, arange, within
from lemix_stage_worker.model.scoring import NO_TARGET, loss_sum, target_rows, token_logprobs
from lemix_stage_worker.model.self_check import build_stages, relative_difference
from lemix_stage_worker.model.stage import StageModel
from numerics.subjects import Subject

PROMPT = 9


@pytest.fixture
def stage(subject: Subject) -> StageModel:
    """The whole model as one stage."""
    return build_stages(subject.source, [range(subject.source.num_layers)])[0]


@pytest.fixture(name="hidden_TD")
def _last_hidden(stage: StageModel, subject: Subject) -> Tensor:
    """The last hidden states of one sequence."""
    return stage(subject.ids[:1], arange(24))[0].detach()


@pytest.fixture(name="targets_T")
def _reference(subject: Subject) -> Tensor:
    """The reference after the prompt, one token ahead."""
    targets_T = subject.ids[0].roll(-1).clone()
    targets_T[: PROMPT - 1] = NO_TARGET
    targets_T[-1] = NO_TARGET
    return targets_T


def test_scores_are_the_whole_models(
    stage: StageModel, subject: Subject, hidden_TD: Tensor, targets_T: Tensor
) -> None:
    """Each reference token's log-probability under the whole model, in order, and nothing for the prompt."""
    logprobs_TV = subject.whole(subject.ids[:1]).logits[0].float().log_softmax(-1)
    expected = [logprobs_TV[place - 1, subject.ids[0, place]].item() for place in range(PROMPT, 24)]
    assert token_logprobs(stage, hidden_TD, targets_T).tolist() == pytest.approx(expected, abs=within(1e-5))


def test_a_score_does_not_depend_on_how_many_are_asked_for(
    stage: StageModel, hidden_TD: Tensor, targets_T: Tensor
) -> None:
    """One token at a time gives the bits of all at once (on the CPU)."""
    together = token_logprobs(stage, hidden_TD, targets_T)
    alone = [
        token_logprobs(stage, hidden_TD[row], targets_T[row]) for row in target_rows(targets_T, max_rows=1)
    ]
    assert relative_difference(torch.cat(alone), together) <= (within(0.0) if IS_GPU else 0.0)


def test_the_loss_is_the_references_and_has_the_whole_models_gradient(
    stage: StageModel, subject: Subject, hidden_TD: Tensor, targets_T: Tensor
) -> None:
    """Minus the sum of the scores; its gradient is that of the whole model's cross entropy over the reference."""
    arriving_TD = hidden_TD.clone().requires_grad_()
    loss = loss_sum(stage, arriving_TD, targets_T)
    torch.autograd.backward(loss)
    whole_TD = hidden_TD.clone().requires_grad_()
    logits_TV = subject.whole.lm_head(whole_TD)
    expected = torch.nn.functional.cross_entropy(
        logits_TV, targets_T, reduction="sum", ignore_index=NO_TARGET
    )
    torch.autograd.backward(expected)
    assert loss.dtype == torch.float32
    assert relative_difference(loss, expected) <= within(1e-6)
    assert arriving_TD.grad is not None
    assert whole_TD.grad is not None
    assert relative_difference(arriving_TD.grad, whole_TD.grad) <= within(1e-6)
    assert not arriving_TD.grad[: PROMPT - 1].any()
    subject.whole.zero_grad()


def test_the_loss_adds_up_over_chunks(stage: StageModel, hidden_TD: Tensor, targets_T: Tensor) -> None:
    """In chunks, a serving step may come between, and no logits of the whole sequence exist at once."""
    chunks = target_rows(targets_T, max_rows=6)
    assert [len(rows) for rows in chunks] == [5, 5, 5]
    loss = sum(loss_sum(stage, hidden_TD[rows], targets_T[rows]) for rows in chunks)
    assert isinstance(loss, Tensor)
    assert relative_difference(loss, loss_sum(stage, hidden_TD, targets_T)) <= within(1e-6)


def test_nothing_to_score_is_no_score_and_no_loss(stage: StageModel, hidden_TD: Tensor) -> None:
    """An empty reference is legal, and its loss can be backpropagated."""
    targets_T = torch.full((24,), NO_TARGET, device=DEVICE)
    arriving_TD = hidden_TD.clone().requires_grad_()
    loss = loss_sum(stage, arriving_TD, targets_T)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert target_rows(targets_T) == target_rows(targets_T, max_rows=4) == ()
    assert token_logprobs(stage, hidden_TD, targets_T).shape == (0,)


def test_a_loss_is_as_precise_as_its_model(stage: StageModel, hidden_TD: Tensor, targets_T: Tensor) -> None:
    """A model in float64 has its loss in float64; one in less than float32 has it in float32."""
    for dtype, precision in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        narrow = stage.shell()
        narrow.load({name: leaf.detach().to(dtype) for name, leaf in _by_source(stage).items()})
        assert loss_sum(narrow, hidden_TD.to(dtype), targets_T).dtype == precision


def _by_source(stage: StageModel) -> dict[str, Tensor]:
    return {leaf.source: leaf.parameter for leaf in stage.all_leaves()}
