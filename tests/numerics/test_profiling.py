"""Each kind of work measured on a stage, by the code that the cluster runs."""

from __future__ import annotations

import random

import pytest

from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.source import ModelSource, open_model
from lemix_stage_worker.profiling.grid import Cell, grid
from lemix_stage_worker.profiling.hop import measure_hops
from lemix_stage_worker.profiling.measuring import measure_stage
from lemix_stage_worker.profiling.subject import Subject, host_stage
from tiny_model import CONTEXT, write_tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model of two layers."""
    return open_model(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module", params=[0, 1])
def subject(request: pytest.FixtureRequest, source: ModelSource) -> Subject:
    """Each stage of two, hosted."""
    return host_stage(source, request.param, cut_model(source, 2), cache_tokens=128)


def test_every_kind_of_work_is_measured_on_every_stage(subject: Subject) -> None:
    """Each cell gives a figure above nothing for each kind of span that it makes, the longer passes included."""
    cells = (Cell("prompt", (16,)), Cell("score", (16, 9)), Cell("train", (8, 8)), Cell("decode", (16, 16)))
    samples, optimizer_s = measure_stage(subject, cells, rounds=1, order=random.Random(0))
    found = [(sample.kind, sample.tokens, sample.contexts) for sample in samples]
    assert sorted(found) == [
        ("decode", 2, 32),
        ("prefill", 16, 256),
        ("prefill", 25, 337),
        ("training_backward", 16, 128),
        ("training_forward", 16, 128),
    ]
    assert all(sample.seconds > 0 for sample in samples)
    assert optimizer_s > 0


def test_measuring_changes_the_weights_by_next_to_nothing(subject: Subject) -> None:
    """So many optimizer steps later they are numbers still, and every pass finds its gradients new."""
    state = subject.host.training
    assert state is not None
    steps, before = state.step, {name: leaf.detach().clone() for name, leaf in state.model.leaves().items()}
    for _ in range(3):
        subject.run(Cell("train", (16,)))
        subject.optimize()
    assert state.step == steps + 3
    for name, leaf in state.model.leaves().items():
        assert (leaf - before[name]).abs().max() < 1e-6
        assert leaf.grad is None


def test_bytes_are_those_that_the_cluster_goes_by(subject: Subject) -> None:
    """Weights, AdamW's two moments and the gradients; keys and values of one layer; activations grow with tokens."""
    weights = subject.host.template.weight_bytes
    assert subject.training_bytes == 3 * weights
    assert subject.kv_token_bytes == 2 * 16 * 4
    assert (
        subject.activation_bytes(Cell("train", (32,))) > subject.activation_bytes(Cell("train", (8, 8))) > 0
    )


def test_hops_are_measured_between_two_processes(source: ModelSource) -> None:
    """Each size arrives, and takes less than a fixed time of any machine."""
    hops = measure_hops(source, rounds=1)
    assert [hop["tokens"] for hop in hops] == sorted(hop["tokens"] for hop in hops)
    assert all(0 < hop["seconds"] < 1 for hop in hops)


@pytest.mark.slow
def test_the_grid_of_a_short_context_can_be_computed(source: ModelSource, subject: Subject) -> None:
    """All cells that a model of 64 tokens allows fit its positions and the cache."""
    for cell in grid(context_length=source.context_length, cache_tokens=128, quick=True):
        assert max(cell.lengths) <= CONTEXT
        subject.run(cell)
