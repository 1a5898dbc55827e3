"""What one stage trains: its optimizer, its copies, its way back from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from devices import DEVICE, float32_only
from lemix_common.ids import BASE_VERSION, Version
from lemix_common.store.training import PlannedStep
from lemix_stage_worker import training_state
from lemix_stage_worker.hosted_stage import build_template, training_on
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.trained_weights import Weights
from lemix_stage_worker.training_state import TrainingState
from numerics.subjects import Subject

pytestmark = float32_only


def planned(step: int, optimizer: str = "adamw") -> PlannedStep:
    """A step without examples: only its numbers are used."""
    return PlannedStep(
        run="main",
        step=step,
        items=(),
        cuts=(),
        shards=(),
        reference_tokens=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        seed=0,
        optimizer=optimizer,
    )


def served_stage(subject: Subject) -> StageModel:
    """The whole model as one stage, not trained."""
    (layers,) = cut_model(subject.source, 1)
    shell = build_template(subject.source, 0, (layers,)).shell()
    shell.load(subject.source.read(shell.parameter_names()), trainable=False)
    return shell


def state_on(served: StageModel, subject: Subject) -> TrainingState:
    """A fresh training state that shares a served version's tensors."""
    return training_on(served, build_template(subject.source, 0, cut_model(subject.source, 1)), BASE_VERSION)


def gradients_for(state: TrainingState, step: int) -> dict[str, Tensor]:
    """Random gradients by leaf, a tied head's left out (its sum is the embedding's)."""
    generator = torch.Generator().manual_seed(step)
    leaves = state.model.leaves()
    return {
        name: torch.randn(leaves[name].shape, generator=generator).to(DEVICE) for name in state._updated()
    }


def run(state: TrainingState, steps: range, optimizer: str = "adamw") -> TrainingState:
    """Apply some steps."""
    for step in steps:
        for _ in state.apply(gradients_for(state, step), planned(step, optimizer), scale=1.0):
            pass
    return state


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same bits under the same names."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("bucket_bytes", [1, 4000, 1 << 30])
def test_an_interrupted_optimizer_makes_the_same_step(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    """Between two buckets a new attempt may clear the parameters' gradients: the committed ones are applied still."""
    served = served_stage(subject)
    expected = run(state_on(served, subject), range(1, 4)).snapshot(optimizer=True)
    monkeypatch.setattr(training_state, "BUCKET_BYTES", bucket_bytes)
    state = state_on(served, subject)
    for step in range(1, 4):
        for _ in state.apply(gradients_for(state, step), planned(step), scale=1.0):
            for parameter in state.model.leaves().values():
                parameter.grad = None
            assert state.step == step - 1
    assert_equal(state.snapshot(optimizer=True), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_goes_on_to_the_bit(subject: Subject, optimizer: str) -> None:
    """Weights and moments of step 2, loaded afresh, make the same step 4; a snapshot of them is the same again."""
    served = served_stage(subject)
    state = run(state_on(served, subject), range(1, 3), optimizer)
    saved = state.snapshot(optimizer=True)
    run(state, range(3, 5), optimizer)
    shell = served.shell()
    shell.load({name: saved[name].clone() for name in shell.parameter_names()})
    moments = {name: tensor.clone() for name, tensor in saved.items() if name.startswith("optimizer.")}
    assert bool(moments) == (optimizer == "adamw")
    loaded = TrainingState(2, Weights(shell), moments=moments)
    assert_equal(loaded.snapshot(optimizer=True), saved)
    assert_equal(run(loaded, range(3, 5), optimizer).snapshot(optimizer=True), state.snapshot(optimizer=True))


def test_training_leaves_the_served_version_as_it_is(subject: Subject) -> None:
    """The weights are shared until the first step, then training has its own."""
    served = served_stage(subject)
    before = {leaf.source: leaf.parameter.detach().clone() for leaf in served.all_leaves()}
    state = state_on(served, subject)
    pointers = {leaf.parameter.data_ptr() for leaf in served.all_leaves()}
    assert {leaf.parameter.data_ptr() for leaf in state.model.all_leaves()} == pointers
    run(state, range(1, 2))
    assert not {leaf.parameter.data_ptr() for leaf in state.model.all_leaves()} & pointers
    assert_equal({leaf.source: leaf.parameter for leaf in served.all_leaves()}, before)


def test_a_tied_embedding_is_stepped_once(subject: Subject) -> None:
    """Embedding and head stay one tensor, moved by one update from their summed gradient."""
    if not subject.source.is_tied:
        pytest.skip("this model's head has weights of its own")
    state = run(state_on(served_stage(subject), subject), range(1, 3))
    leaves = state.model.leaves()
    embedding, head = leaves[subject.source.embedding_name], leaves["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()
    expected = subject.source.read([subject.source.embedding_name])[
        subject.source.embedding_name
    ].requires_grad_()
    optimizer = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(1, 3):
        expected.grad = gradients_for(state, step)[subject.source.embedding_name]
        optimizer.step()
    assert torch.equal(embedding, expected)


def test_a_step_without_gradients_only_counts(subject: Subject) -> None:
    """Nothing could be learned from: the weights stay, the step is one further."""
    served = served_stage(subject)
    state = state_on(served, subject)
    for _ in state.apply({}, planned(1), scale=1.0):
        pass
    assert state.step == 1
    assert_equal(
        state.snapshot(optimizer=False),
        {leaf.name: leaf.parameter for leaf in served.all_leaves() if not state._is_tied_head(leaf.name)},
    )


def test_updates_too_small_for_bfloat16_add_up(subject: Subject) -> None:
    """The optimizer's float32 masters keep them; the weights are the masters, rounded."""
    shell = served_stage(subject).shell()
    shell.load(
        {name: tensor.bfloat16() for name, tensor in subject.source.read(shell.parameter_names()).items()}
    )
    state = TrainingState(0, Weights(shell))
    start = state.snapshot(optimizer=False)
    small = replace(planned(1), learning_rate=1e-5, weight_decay=0.0)
    ones = {
        name: torch.ones_like(state.model.leaves()[name], dtype=torch.float32) for name in state._updated()
    }
    for _ in range(20):
        for _ in state.apply({name: tensor.clone() for name, tensor in ones.items()}, small, scale=1.0):
            pass
    saved = state.snapshot(optimizer=True)
    for name, before in start.items():
        torch.testing.assert_close(saved[name], before.float() - 20e-5, rtol=1e-6, atol=2e-6)
        assert torch.equal(state.model.leaves()[name], saved[name].bfloat16())
    masters = {name: tensor for name, tensor in saved.items() if not name.startswith("optimizer.")}
    again = served_stage(subject).shell()
    again.load({name: tensor.bfloat16() for name, tensor in masters.items()})
    moments = {name: tensor for name, tensor in saved.items() if name.startswith("optimizer.")}
    loaded = TrainingState(20, Weights(again), moments=moments, masters=masters)
    assert_equal(loaded.snapshot(optimizer=True), saved)
    for each in (state, loaded):
        for _ in each.apply({name: tensor.clone() for name, tensor in ones.items()}, small, scale=1.0):
            pass
    assert_equal(loaded.snapshot(optimizer=True), state.snapshot(optimizer=True))


def test_overlapping_steps_keep_the_version_before(subject: Subject) -> None:
    """Two versions, never three: the optimizer writes over the oldest, and a checkpoint has both."""
    served = served_stage(subject)
    template = build_template(subject.source, 0, cut_model(subject.source, 1))
    state = training_on(served, template, Version(0, 0), overlaps=True)
    plain = state_on(served, subject)
    assert state.weights_at(0) is state.newest
    seen = []
    for step in range(1, 5):
        before = plain.snapshot(optimizer=False)
        run(plain, range(step, step + 1))
        run(state, range(step, step + 1))
        older = state.weights_at(step - 1)
        assert older is not None
        assert state.weights_at(step - 2) is None
        leaves = older.leaves()
        assert_equal({name: leaves[name].detach() for name in before}, before)
        assert_equal(state.snapshot(optimizer=False), plain.snapshot(optimizer=False))
        seen.append({weights.leaves()[next(iter(before))].data_ptr() for weights in (state.newest, older)})
    assert seen[1] == seen[2] == seen[3]
    saved = state.snapshot(optimizer=True)
    assert {name.split(".")[1] for name in saved if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "older",
    }
