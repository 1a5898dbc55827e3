"""Ask a cluster for text: all of it at the end, or token by token as it comes."""

from __future__ import annotations

from tutorial.conftest import StartCluster


def test_an_answer_can_be_waited_for_or_streamed(start_cluster: StartCluster) -> None:
    """Both bring the same tokens, and name the weights they came from."""
    _, client = start_cluster()

    answer = client.generate("the cat", max_new_tokens=8, ignore_eos=True)
    assert len(answer.tokens) == 8
    assert answer.weights_version == "0.0"  # the model folder's own weights

    with client.stream("the cat", max_new_tokens=8, ignore_eos=True) as stream:
        chunks = list(stream)
    assert [token for chunk in chunks for token in chunk.tokens] == list(answer.tokens)


def test_a_score_says_how_likely_a_text_is(start_cluster: StartCluster) -> None:
    """One log-probability a token of the reference, and minus their mean."""
    _, client = start_cluster()

    score = client.score("the cat", reference="sat on a hill")

    assert len(score.logprobs) == 4
    assert score.loss == -sum(score.logprobs) / 4
