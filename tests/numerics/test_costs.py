"""The first estimate of what a model's parts cost."""

from __future__ import annotations

import copy
import math

import pytest

from lemix_common.errors import ModelError
from lemix_stage_worker.model.costs import LAYER_SHARE, cut_model, model_costs
from lemix_stage_worker.model.source import describe_model
from lemix_stage_worker.model.weights import MemoryWeights
from numerics.subjects import GENERATED, Subject, random_tensors


def test_layers_and_head_cost_their_parameters(subject: Subject) -> None:
    """A multiply-add per parameter and token, a layer more than its products; a tied head costs what others do."""
    source = subject.source
    costs = model_costs(source)
    layer = sum(
        math.prod(spec.shape)
        for name, spec in source.specs.items()
        if name.startswith(source.layer_prefix(1))
    )
    assert costs.layers == (layer * LAYER_SHARE,) * source.num_layers
    assert costs.head == source.vocab_size * source.hidden_size
    assert 0 < costs.embedding < costs.head


def test_a_model_is_cut_into_as_many_stages_as_layers_at_most(subject: Subject) -> None:
    """Every layer is in exactly one stage, and too many stages are refused."""
    num_layers = subject.source.num_layers
    for stages in range(1, num_layers + 1):
        assert [layer for cut in cut_model(subject.source, stages) for layer in cut] == list(
            range(num_layers)
        )
    with pytest.raises(ModelError, match=f"choose 1 to {num_layers} stages"):
        cut_model(subject.source, num_layers + 1)


def test_a_large_vocabulary_relieves_the_last_stage() -> None:
    """The head is heavy, so its stage has fewer layers."""
    config = copy.deepcopy(GENERATED["llama"])
    config.vocab_size = 900
    source = describe_model(config, MemoryWeights(random_tensors(config)))
    first, last = cut_model(source, 2)
    assert (len(first), len(last)) == (4, 1)
