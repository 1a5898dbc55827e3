"""What a model's layers, embedding and head cost, as far as its shapes tell, and the cut that follows.

The unit is one multiply-add per token: a matrix of n parameters costs n. Measured figures replace these estimates
once a stage has run; the cut at start has nothing better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lemix_common.partition import cut_layers
from lemix_stage_worker.model.skeleton import HEAD_WEIGHT
from lemix_stage_worker.model.source import ModelSource

EMBEDDING_SHARE = 1 / 16
"""What an embedding's parameter costs beside a layer's: no product, but a dense gradient and an optimizer step
(measured 0.07 at steps of 1,024 tokens, Llama of 8 layers × 512, vocabulary 8,192)."""

LAYER_SHARE = 1.25
"""What a layer costs beside the products of its matrices: attention, norms, activations and what calls them
(measured 1.17 in training on examples of 64 tokens, 1.3 where 8 requests decode; the same Llama)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Multiply-adds per token."""

    layers: tuple[float, ...]
    embedding: float
    head: float


def model_costs(source: ModelSource) -> ModelCosts:
    """The costs of a model's parts, from the shapes of its parameters."""
    num_parameters = {name: math.prod(spec.shape) for name, spec in source.specs.items()}
    embedding = num_parameters[source.embedding_name]

    def layer_cost(layer: int) -> float:
        prefix = source.layer_prefix(layer)
        return LAYER_SHARE * sum(count for name, count in num_parameters.items() if name.startswith(prefix))

    return ModelCosts(
        layers=tuple(map(layer_cost, range(source.num_layers))),
        embedding=embedding * EMBEDDING_SHARE,
        head=float(num_parameters.get(HEAD_WEIGHT, embedding)),
    )


def cut_model(source: ModelSource, stages: int) -> tuple[range, ...]:
    """The layers of each stage, as balanced as the costs allow; more stages than layers is a `ModelError`."""
    costs = model_costs(source)
    return cut_layers(costs.layers, stages, first_extra=costs.embedding, last_extra=costs.head)
