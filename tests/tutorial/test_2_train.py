"""Train the model that is being served: examples go in, the served version rises, answers get better."""

from __future__ import annotations

from lemix import TrainItem
from tutorial.conftest import StartCluster


def test_the_served_model_learns_from_examples(start_cluster: StartCluster) -> None:
    """Two examples make one step here; when it is served, the sentence is more likely than before."""
    _, client = start_cluster(step_examples=2)
    before = client.score("the cat", "sat on a hill")

    learned = [client.submit(TrainItem("the cat", "sat on a hill")) for _ in range(8)]

    assert [future.result(timeout=20).step for future in learned] == [1, 1, 2, 2, 3, 3, 4, 4]
    after = client.score("the cat", "sat on a hill")
    assert (before.weights_version, after.weights_version) == ("0.0", "0.4")
    assert after.loss < before.loss


def test_a_flush_trains_on_what_is_left(start_cluster: StartCluster) -> None:
    """One example is too little for a step of eight; a flush makes a smaller step of it."""
    _, client = start_cluster(step_examples=8)

    learned = client.submit(TrainItem("the dog", "ran"))

    assert client.flush(timeout=20) == "0.1"
    assert learned.result(timeout=20).weights_version == "0.1"
