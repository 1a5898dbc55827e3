"""Examples packed into one row are computed as each would be alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from devices import DEVICE, DTYPE, arange, within
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.model.attention import attention_by_segments
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.model.self_check import relative_difference
from lemix_stage_worker.model.skeleton import build_skeleton
from numerics.microbatches import LENGTHS, RARE, examples, learn, loaded_stages, packed
from numerics.subjects import GENERATED, Subject

TOLERANCES = {DTYPE: within(1e-6), torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_packed_learning_is_learning_one_by_one(subject: Subject, dtype: torch.dtype) -> None:
    """Each example's loss, and the gradients of all; the sums over a row may round differently."""
    rows = examples(subject.source.vocab_size)
    losses, gradients = learn(loaded_stages(subject.source, 2, dtype), [packed(rows)])
    alone, expected = learn(loaded_stages(subject.source, 2, dtype), rows)
    assert losses == pytest.approx(alone, rel=TOLERANCES[dtype])
    assert gradients.keys() == expected.keys()
    assert relative_difference(_all(gradients), _all(expected)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_a_packed_row_has_the_bits_of_its_examples(window: int | None) -> None:
    """Forward and backward, each example's attention is what it is alone, also beyond a window."""
    config = GENERATED["llama" if window is None else "mistral"]
    make_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    stage = build_skeleton(config, torch.float32).base
    module = next(
        module for module in stage.modules() if isinstance(module, LlamaAttention | MistralAttention)
    )
    generator = torch.Generator().manual_seed(3)

    def attend(states: tuple[Tensor, ...], positions_T: Tensor) -> tuple[Tensor, ...]:
        arriving = [part.detach().clone().requires_grad_() for part in states]
        num_tokens = len(positions_T)
        mask: Any = make_mask(
            config=stage.config,
            inputs_embeds=torch.empty(1, num_tokens, 32, device=DEVICE),
            attention_mask=None,
            past_key_values=None,
            position_ids=positions_T[None],
        )
        output = attention_by_segments(module, arriving[0], arriving[1], arriving[2], mask)[0]
        torch.autograd.backward(output, torch.linspace(-1, 1, 32, device=DEVICE).view(4, 8).expand_as(output))
        return output, *(part.grad for part in arriving if part.grad is not None)

    key_heads = config.num_key_value_heads
    states = tuple(
        torch.randn(1, sum(LENGTHS), count, 8, generator=generator).transpose(1, 2).to(DEVICE)
        for count in (4, key_heads, key_heads)
    )
    together = attend(states, torch.cat([arange(length) for length in LENGTHS]))
    pieces = zip(*(torch.split_with_sizes(part, LENGTHS, dim=2) for part in states), strict=True)
    alone = [attend(piece, arange(piece[0].shape[2])) for piece in pieces]
    output, *gradients = zip(*alone, strict=True)
    assert torch.equal(together[0], torch.cat(output, dim=1))
    for found, expected in zip(together[1:], gradients, strict=True):
        assert torch.equal(found, torch.cat(expected, dim=2))


def test_packed_rows_are_transformers_own(subject: Subject) -> None:
    """The whole model of transformers, with a dense mask over the row, gives the same logits."""
    row = packed(examples(subject.source.vocab_size))
    (stage,) = loaded_stages(subject.source, 1, DTYPE)
    positions_BT = torch.cat([arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        expected = subject.whole(input_ids=row.ids, position_ids=positions_BT, use_cache=False).logits
        found = stage.logits(_run(LayerPass(stage.parts(), row.lengths), row.ids))
    assert relative_difference(found, expected) <= within(1e-5)


def test_a_poisoned_example_spoils_no_other(subject: Subject) -> None:
    """Its loss isn't finite, and names it; the others' are what they were, but the sum of gradients is spoiled."""
    rows = examples(subject.source.vocab_size)
    rows[1].ids[0, 3] = RARE
    stages = loaded_stages(subject.source, 2, torch.float32)
    healthy, _ = learn(stages, [packed(rows)])
    with torch.no_grad():
        stages[0].leaves()[subject.source.embedding_name][RARE] = math.nan
    losses, gradients = learn(stages, [packed(rows)])
    assert math.isnan(losses[1])
    assert (losses[0], losses[2]) == (healthy[0], healthy[2])
    assert not _all(gradients).isfinite().all()


def test_a_row_may_have_more_targets_than_the_head_takes_at_once(subject: Subject) -> None:
    """Examples whose targets lie in two chunks of the head lose what they lose alone; each chunk is a safepoint."""
    rows = examples(subject.source.vocab_size, [60] * 6)
    row = packed(rows)
    losses, gradients = learn(loaded_stages(subject.source, 1, torch.float64), [row])
    alone, expected = learn(loaded_stages(subject.source, 1, torch.float64), rows)
    assert losses == pytest.approx(alone, rel=1e-12)
    assert relative_difference(_all(gradients), _all(expected)) <= 1e-12
    (stage,) = loaded_stages(subject.source, 1, torch.float64)
    head = HeadPass(
        stage, torch.ones(1, 360, subject.source.hidden_size, dtype=torch.float64, device=DEVICE), row.lengths
    )
    assert [len(head.losses) for _ in head.run(row.targets, 1)] == [6, 6]
    assert sum(head.losses) == head.loss


def test_a_row_without_targets_loses_nothing(subject: Subject) -> None:
    """Each of its examples has a loss of zero, and the hidden states a gradient of zeros."""
    (stage,) = loaded_stages(subject.source, 1, torch.float32)
    head = HeadPass(stage, torch.ones(1, 5, subject.source.hidden_size, device=DEVICE), (2, 3))
    assert list(head.run(torch.full((1, 5), NO_TARGET, device=DEVICE), 1)) == []
    assert (head.losses, head.loss) == ((0.0, 0.0), 0.0)
    assert not head.gradient_BTD.any()


def _run(layers: LayerPass, ids_BT: Tensor) -> Tensor:
    for _ in layers.forward(ids_BT):
        pass
    return layers.output


def _all(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])
