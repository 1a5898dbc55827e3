"""A stage's layers one by one, called as the first of them was, compute what the stage computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from devices import DEVICE, DTYPE, arange
from lemix_stage_worker.layer_passes import LayerPass
from lemix_stage_worker.model.layer_call import kind_of
from lemix_stage_worker.model.source import ModelSource, open_model
from lemix_stage_worker.model.stage import StageModel
from numerics.microbatches import LENGTHS, examples, loaded_stages, packed
from numerics.subjects import Subject, random_tensors, write_model


def _passed(stage: StageModel, source: Tensor, *, recompute: bool) -> Tensor:
    layers = LayerPass(stage.parts(), LENGTHS, recompute=recompute)
    for _ in layers.forward(source):
        pass
    return layers.output


def _assert_equal(source: ModelSource, *, num_stages: int, recompute: bool) -> None:
    hidden = packed(examples(source.vocab_size)).ids
    positions_T = torch.cat([arange(length) for length in LENGTHS])
    for stage in loaded_stages(source, num_stages, DTYPE):
        found = _passed(stage, hidden, recompute=recompute)
        hidden = stage(hidden, positions_T).detach()
        assert torch.equal(found, hidden)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_layers_one_by_one_are_the_stage(subject: Subject, num_stages: int, *, recompute: bool) -> None:
    """To the bit, in every family, with the embedding and the norm at the ends."""
    _assert_equal(subject.source, num_stages=num_stages, recompute=recompute)


def test_each_kind_of_layer_is_called_with_its_own_mask(tmp_path: Path) -> None:
    """A model of full and sliding layers by turns, whose window is shorter than an example."""
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    )  # fmt: skip
    source = open_model(write_model(tmp_path, config, random_tensors(config)), device=DEVICE)
    (stage,) = loaded_stages(source, 1, DTYPE)
    assert len({kind_of(part) for part in stage.parts()}) == 2
    _assert_equal(source, num_stages=2, recompute=False)
