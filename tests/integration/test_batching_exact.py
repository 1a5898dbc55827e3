"""Requests that share iterations: each gets what the whole model says to it alone, however they are batched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batch_scene import Mixture, Plan, Watch, drawn
from clusters import fresh_broker
from lemix_common.server import RunningBroker
from numerics.subjects import GENERATED, REAL_MODELS, TRAINED
from switch_scene import switching, write_subject

QUICK = [
    pytest.param("llama", Plan(seed=1, stages=3), id="llama, 3 stages"),
    pytest.param(
        "gpt2",
        Plan(seed=2, requests=8, contexts=1.0, grows=True, max_block_ms=1.0, max_batch_tokens=16),
        id="gpt2, 2 stages, little memory, small chunks",
    ),
    pytest.param("llama", Plan(seed=3, stages=1, switches=1), id="llama, 1 stage, a new version"),
    pytest.param(
        "llama",
        Plan(seed=4, stages=2, contexts=1.0, batching="paper", max_running=4),
        id="llama, 2 stages, the paper's rule",
    ),
]


def folder_of(name: str, tmp_path: Path) -> Path:
    """The model's, made if it isn't a trained one."""
    folder = write_subject(tmp_path / name, name) if name in GENERATED else REAL_MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def serve(server: RunningBroker, tmp_path: Path, patch: pytest.MonkeyPatch, name: str, plan: Plan) -> Watch:
    """Run a plan and check what came of it."""
    watch, folder = Watch(), folder_of(name, tmp_path)
    watch.install(patch)
    settings = plan.settings(folder) | ({"learning_rate": 1e-3} if name in TRAINED else {})
    with fresh_broker(server) as broker, switching(broker, folder, tmp_path, patch, **settings) as scene:
        mixture = Mixture(scene, plan)
        mixture.run()
        mixture.check()
    print(
        f"{name}, {plan}: {plan.requests} requests, {len(mixture.cancelled)} cancelled, {watch}; "
        f"{mixture.tally.positions} tokens, {mixture.tally.differing} near ties"
    )
    assert watch.most_in_flight <= (1 if plan.batching == "paper" else plan.stages)
    assert all(count <= plan.stages for count in watch.ends_until_free)
    return watch


@pytest.mark.parametrize(("name", "plan"), QUICK)
def test_whoever_shares_a_batch_gets_the_whole_models_tokens(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, plan: Plan
) -> None:
    """Greedy and sampled requests and scores, with shared beginnings, that join, leave, are cancelled, moved on."""
    watch = serve(server, tmp_path, monkeypatch, name, plan)
    assert watch.widest > 1
    assert watch.num_reused > 0 or plan.grows
    assert watch.num_preempted > 0 or not plan.grows


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 22))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_64_requests_in_any_cluster(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """Of 1 to 5 stages, with any memory, chunks, rule and number of new versions."""
    serve(server, tmp_path, monkeypatch, name, drawn(seed))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(30, 36))
@pytest.mark.parametrize("name", TRAINED)
def test_64_requests_to_a_trained_model(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """The same, where other tokens would be other words."""
    serve(server, tmp_path, monkeypatch, name, drawn(seed))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_requests_get_the_same_tokens_in_all_clusters(
    server: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 to 5 stages: pre-empted or not, in chunks of any size, by either rule."""
    for stages in range(1, 6):
        (tmp_path / str(stages)).mkdir()
        plan = replace(drawn(100 + stages), stages=stages, seed=7, grows=True, contexts=1.0, max_running=16)
        assert serve(server, tmp_path / str(stages), monkeypatch, "gpt2", plan).num_preempted > 0
