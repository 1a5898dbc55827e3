"""Optimizer, clipping and learning-rate schedule through a cluster: torch's own numbers, whatever the cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clusters import fresh_broker, in_process_cluster
from lemix import TrainItem
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_coordinator.steps import learning_rate_at
from numerics.subjects import GENERATED, random_tensors, write_model
from references import relative_difference, whole_model, write_number_tokenizer

ROWS = [((3 + i, 9 + i), (5 + i, 30 - i, 12)) for i in range(16)]
SETTINGS = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.0},
    "clipped": {"learning_rate": 1e-3, "max_gradient_norm": 0.5},
    "scheduled": {
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "schedule_steps": 6,
        "learning_rate_schedule": "cosine",
        "max_gradient_norm": 1.0,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2, whose embedding is tied: its gradient must count once in the norm."""
    config = GENERATED["gpt2"]
    folder = write_model(tmp_path_factory.mktemp("gpt2"), config, random_tensors(config))
    return write_number_tokenizer(folder, config.vocab_size)


def plain_loop(folder: Path, settings: ClusterSettings) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and gradient norms of torch's optimizer and clipping over the whole model."""
    model, norms = whole_model(folder), []
    parameters = list(model.parameters())
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(parameters, lr=1.0, weight_decay=settings.weight_decay)
    for step, start in enumerate(range(0, len(ROWS), settings.step_examples), start=1):
        rows = ROWS[start : start + settings.step_examples]
        num_targets = sum(len(reference) for _, reference in rows)
        for prompt, reference in rows:
            logits_TV = model(torch.tensor([[*prompt, *reference]])).logits[0, len(prompt) - 1 : -1]
            loss = functional.cross_entropy(logits_TV, torch.tensor(reference), reduction="sum")
            torch.autograd.backward(loss / num_targets)
        bound = settings.max_gradient_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, bound)))
        optimizer.param_groups[0]["lr"] = learning_rate_at(settings, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


@pytest.mark.parametrize(
    "name", ["scheduled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "clipped"))]
)
def test_steps_are_torchs_whatever_the_cut(
    folder: Path, server: RunningBroker, tmp_path: Path, name: str
) -> None:
    """Weights and reported gradient norms are those of a plain loop; both cuts end with the same bits."""
    fingerprints = set()
    for nodes, stages in ((1, 1), (2, 3)):
        settings = ClusterSettings(
            model=str(folder),
            nodes=nodes,
            stages=stages,
            step_examples=4,
            **SETTINGS[name],  # type: ignore[arg-type]
        )
        data_dir = tmp_path / f"{nodes}x{stages}"
        with (
            fresh_broker(server) as broker,
            in_process_cluster(broker, settings, data_dir) as (cluster, client),
        ):
            for future in [client.submit(TrainItem(*row)) for row in ROWS]:
                future.result(30)
            weights, fingerprint = cluster.weights(0), cluster.fingerprint(nodes - 1)
            norms = [
                float(broker.hash(broker.keys.step("main", step))["gradient_norm"]) for step in range(1, 5)
            ]
        fingerprints.add(fingerprint)
    expected, expected_norms = plain_loop(folder, settings)
    assert len(fingerprints) == 1
    assert relative_difference(weights, expected) <= 1e-6
    assert norms == pytest.approx(expected_norms, rel=1e-5)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    """Step by step: rising to the full rate, then a line (or half a cosine) that is 0 after ``schedule_steps``."""
    base = {"learning_rate": 1.0, "warmup_steps": 3, "schedule_steps": 7}
    linear = ClusterSettings(learning_rate_schedule="linear", **base)  # type: ignore[arg-type]
    assert [learning_rate_at(linear, step) for step in range(1, 10)] == [
        0.25,
        0.5,
        0.75,
        1,
        0.75,
        0.5,
        0.25,
        0,
        0,
    ]
    cosine = ClusterSettings(learning_rate_schedule="cosine", **base)  # type: ignore[arg-type]
    assert learning_rate_at(cosine, 4) == 1
    assert learning_rate_at(cosine, 6) == pytest.approx(0.5)
    assert learning_rate_at(cosine, 8) == pytest.approx(0)
    constant = ClusterSettings(learning_rate=1.0)
    assert {learning_rate_at(constant, step) for step in (1, 5, 500)} == {1.0}
