"""Cut the model over workers: it stays one model, to the bit."""

from __future__ import annotations

from lemix import TrainItem
from lemix_common.sampling import Sampling
from tutorial.conftest import StartCluster


def test_four_stages_are_the_whole_model(start_cluster: StartCluster) -> None:
    """The same tokens, the same scores and, after training, weights of the same sha256."""
    sampling, seen = Sampling(temperature=1.0, seed=3), []
    for stages in (1, 4):
        cluster, client = start_cluster(stages=stages, step_examples=2)
        tokens = client.generate("the red dog", max_new_tokens=20, sampling=sampling, ignore_eos=True).tokens
        score = client.score("the cat", "sat on a hill").logprobs
        for future in [client.submit(TrainItem("the cat", "ran under a red hill")) for _ in range(4)]:
            future.result(timeout=20)
        seen.append((tokens, score, cluster.fingerprint(node=0)))

    assert seen[0] == seen[1]
