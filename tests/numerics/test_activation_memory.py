"""What training takes on a stage is told before it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from devices import DEVICE, cpu_only
from lemix_stage_worker.activation_memory import (
    SavedTensors,
    StageMemory,
    TrainingWay,
    measure_activations,
    predict_memory,
)
from lemix_stage_worker.layer_passes import LayerPass
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.model.stage import StageModel
from numerics.microbatches import examples, loaded_stages, packed
from numerics.subjects import Subject, random_tensors, write_model

ROWS = [(20, 31, 9), (5,), (55,), (3, 3, 3, 3, 3, 3)]


def really_held(stage: StageModel, source: torch.Tensor, lengths: tuple[int, ...], *, recompute: bool) -> int:
    """The bytes of all that autograd saved and that the pass itself keeps."""
    layers, saved = LayerPass(stage.parts(), lengths, recompute=recompute), SavedTensors()
    with saved.counting():
        for _ in layers.forward(source):
            pass
    for graph in layers._graphs:
        saved.add(graph.source)
    saved.add(layers.output)
    return saved.bytes_beside([*stage.leaves().values(), *stage.base.buffers()])


@cpu_only  # on a GPU attention keeps its sums in blocks of 32 tokens, which rows as short as these don't fill
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_what_a_microbatch_holds_is_told(
    subject: Subject, lengths: tuple[int, ...], *, recompute: bool
) -> None:
    """Within 10 % on every stage, whatever the row is made of."""
    source = packed(examples(subject.source.vocab_size, lengths)).ids
    for stage in loaded_stages(subject.source, 2, torch.float32):
        predicted = measure_activations(stage).held(lengths, recompute=recompute)
        assert predicted == pytest.approx(really_held(stage, source, lengths, recompute=recompute), rel=0.1)
        source = torch.zeros(1, sum(lengths), subject.source.hidden_size, device=DEVICE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> StageModel:
    """Two layers of the bench model's shapes, in bfloat16."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    folder: Path = tmp_path_factory.mktemp("wide")
    return loaded_stages(open_model(write_model(folder, config, random_tensors(config))), 1, torch.bfloat16)[
        0
    ]


def test_a_stages_memory_is_told_by_its_parts(wide: StageModel) -> None:
    """Weights once though the head shares them, float32 masters and moments, and the largest microbatches held."""
    embedding, layers = 8192 * 512, 2 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512) + 512
    activations = measure_activations(wide)
    sizes = [activations.held(lengths) for lengths in ((64,), (200, 56), (16, 16))]
    memory = predict_memory(wide, activations, [(64,), (200, 56), (16, 16)], TrainingWay(held=2))
    assert memory == StageMemory(
        weights=2 * (embedding + layers),
        masters=4 * (embedding + layers),
        moments=8 * (embedding + layers),
        gradients=2 * (2 * embedding + layers),
        shard_sums=2 * (2 * embedding + layers),
        activations=sizes[0] + sizes[1] + 2 * embedding,
        workspace=activations.at_work((200, 56)),
    )
    assert memory.total == sum(
        (
            *(memory.weights, memory.masters, memory.moments, memory.gradients),
            *(memory.shard_sums, memory.activations, memory.workspace),
        )
    )


def test_recomputation_holds_little_and_stochastic_gradients_have_no_moments(wide: StageModel) -> None:
    """Only the inputs of layers are held, and what is computed again comes on top while it is used."""
    activations = measure_activations(wide)
    kept = predict_memory(wide, activations, [(512,)], TrainingWay(held=3, moments=0))
    again = predict_memory(wide, activations, [(512,)], TrainingWay(held=3, moments=0, recompute=True))
    assert kept.moments == again.moments == 0
    assert again.activations == 3 * 512 * (8 + 2 * 512 + 2 * 512) + 2 * 8192 * 512
    assert again.activations < kept.activations / 3
    assert again.total < kept.total


def test_halves_keep_a_heads_gradient_for_each_microbatch(wide: StageModel) -> None:
    """Until the weights' half of a microbatch, its head's gradient can't be added to the others'."""
    activations = measure_activations(wide)
    whole = predict_memory(wide, activations, [(64,)], TrainingWay(held=3))
    halves = predict_memory(wide, activations, [(64,)], TrainingWay(held=3, splits=True, weight_copies=2))
    assert halves.activations - whole.activations == 2 * (2 * 8192 * 512)
    assert halves.weights == 2 * whole.weights
