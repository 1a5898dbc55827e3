"""Kill a worker in the middle of its work: nothing is lost, nothing happens twice."""

from __future__ import annotations

from lemix import GenerateItem, TrainItem
from tutorial.conftest import StartCluster


def test_a_killed_worker_is_not_noticed_in_the_answers(start_cluster: StartCluster) -> None:
    """What was promised is answered as if nothing had happened, the interrupted answer included."""
    cluster, client = start_cluster(stages=2, step_examples=2)
    expected = client.generate("the cat", max_new_tokens=40, ignore_eos=True)

    stream = client.stream("the cat", max_new_tokens=40, ignore_eos=True, timeout=20)
    waiting = client.submit(GenerateItem("the cat", max_new_tokens=40, ignore_eos=True))
    first = next(stream)
    cluster.replace_worker("worker-1")  # kill -9, and a new process in its place
    chunks = [first, *stream]

    assert [token for chunk in chunks for token in chunk.tokens] == list(expected.tokens)
    assert waiting.result(timeout=20).tokens == expected.tokens
    learned = [client.submit(TrainItem("the cat", "sat")) for _ in range(2)]
    assert [future.result(timeout=20).step for future in learned] == [1, 1]
