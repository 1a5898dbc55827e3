"""Examples that can't be learned from: the step is computed again without them, and the weights stay finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clusters import InProcessCluster, fresh_broker, in_process_cluster
from lemix import Client, TrainItem
from lemix_common.errors import ItemFailed
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from numerics.subjects import GENERATED, random_tensors, write_model
from references import write_number_tokenizer

POISON = 7
"""A token whose embedding isn't a number."""
GOOD = [
    ((4, 5), (6, 8)),
    ((9, 10), (11,)),
    ((12,), (13, 14, 15)),
    ((5, 4), (8, 6)),
    ((20,), (21,)),
    ((30,), (31, 32)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in which one token poisons whatever it is part of."""
    config = GENERATED["llama"]
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    folder = write_model(tmp_path_factory.mktemp("poisonous"), config, tensors)
    return write_number_tokenizer(folder, config.vocab_size)


@contextmanager
def cluster_of(
    folder: Path, server: RunningBroker, data_dir: Path, **shape: int
) -> Iterator[tuple[InProcessCluster, Client]]:
    """A cluster whose steps have four examples."""
    settings = ClusterSettings(model=str(folder), step_examples=4, learning_rate=1e-2, **shape)  # type: ignore[arg-type]
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, data_dir) as running:
        yield running


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"nodes": 1, "stages": 1}, marks=pytest.mark.slow),
        {"nodes": 1, "stages": 2},
        pytest.param({"nodes": 2, "stages": 2}, marks=pytest.mark.slow),
        pytest.param({"nodes": 1, "stages": 2, "microbatches": 1}, marks=pytest.mark.slow),
        {"nodes": 2, "stages": 2, "microbatch_tokens": 8},
    ],
    ids=lambda shape: " ".join(f"{value} {name}" for name, value in shape.items()),
)
def test_a_poison_example_is_dead_lettered_and_its_step_goes_on_without_it(
    folder: Path, server: RunningBroker, tmp_path: Path, shape: dict[str, int]
) -> None:
    """The others of its step are learned, also those packed with it; the weights are as if it had never been."""
    clean = [*GOOD[:3], *GOOD[3:]]
    with cluster_of(folder, server, tmp_path / "poisoned", **shape) as (cluster, client):
        rows = [*GOOD[:2], ((POISON,), (3,)), GOOD[2], *GOOD[3:]]
        futures = [client.submit(TrainItem(*row)) for row in rows]
        client.flush(30)
        with pytest.raises(ItemFailed, match="not finite"):
            futures.pop(2).result(30)
        steps = [future.result(30).step for future in futures]
        assert steps == [1, 1, 1, 2, 2, 2]
        assert client.status()["dead_letters"] == 1
        poisoned = {cluster.fingerprint(node) for node in range(shape["nodes"])}
        answer = client.score((4, 5), (6, 8), timeout=30)
        assert torch.tensor(answer.logprobs).isfinite().all()
    assert len(poisoned) == 1
    with cluster_of(folder, server, tmp_path / "clean", nodes=1, stages=1) as (cluster, client):
        futures = [client.submit(TrainItem(*row)) for row in clean[:3]]
        client.flush(30)
        futures += [client.submit(TrainItem(*row)) for row in clean[3:]]
        client.flush(30)
        assert [future.result(30).step for future in futures] == steps
        # shards of four examples and of three are cut differently, so sums differ in rounding: compare losses
        assert client.score((4, 5), (6, 8), timeout=30).loss == pytest.approx(answer.loss, rel=1e-4)


def test_a_step_of_nothing_but_poison_only_counts(
    folder: Path, server: RunningBroker, tmp_path: Path
) -> None:
    """Its number is committed, so later steps keep theirs, and no weight changes."""
    with cluster_of(folder, server, tmp_path, nodes=1, stages=2) as (cluster, client):
        before = cluster.fingerprint(0)
        futures = [client.submit(TrainItem((POISON,), (3, 4))) for _ in range(4)]
        for future in futures:
            with pytest.raises(ItemFailed, match="not finite"):
                future.result(30)
        client.flush(30)
        assert cluster.fingerprint(0) == before
        good = [client.submit(TrainItem(*row)) for row in GOOD[:4]]
        assert {future.result(30).step for future in good} == {2}
        assert cluster.fingerprint(0) != before
