"""What a request asks for, through a running cluster: its tokens are those of the whole transformers model."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from clusters import fresh_broker, in_process_cluster
from lemix import Client, GenerateItem, Sampling, Stopping
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from numerics.subjects import GENERATED, random_tensors, write_model
from references import assert_tokens_equal, whole_model, write_number_tokenizer

CONTEXT = 256
ANSWER_S = 20
PENALTY = 1.3
"""So high that a model of random weights doesn't repeat one token."""


@dataclass(frozen=True)
class Served:
    """A model served by a cluster, and the whole of it."""

    whole: PreTrainedModel
    client: Client

    def prompts(self, count: int) -> list[list[int]]:
        """Random ones, of 1 to 30 tokens."""
        draw, size = random.Random(5), int(self.whole.config.vocab_size)
        return [[draw.randrange(3, size) for _ in range(draw.randrange(1, 31))] for _ in range(count)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def served(
    request: pytest.FixtureRequest, server: RunningBroker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A model on one node of two stages."""
    config = copy.deepcopy(GENERATED[str(request.param)])
    config.max_position_embeddings = CONTEXT
    folder = write_model(tmp_path_factory.mktemp("model"), config, random_tensors(config))
    write_number_tokenizer(folder, config.vocab_size)
    settings = ClusterSettings(model=str(folder), stages=2)
    data_dir = tmp_path_factory.mktemp("data")
    with fresh_broker(server) as broker, in_process_cluster(broker, settings, data_dir) as (_, client):
        yield Served(whole_model(folder), client)


def test_greedy_options_are_those_of_transformers(served: Served) -> None:
    """A repetition penalty, and stop ids that may end it only after some tokens: as its `generate` does one by one."""
    sampling = Sampling(repetition_penalty=PENALTY, min_tokens=9)
    plain = served.client.generate([5], 30, sampling=sampling, ignore_eos=True, timeout=ANSWER_S).tokens
    stopping = Stopping(stop_ids=tuple(sorted({plain[2], plain[12]})))
    items = [
        GenerateItem(prompt, 30, sampling=sampling, stopping=stopping, ignore_eos=True)
        for prompt in ([5], *served.prompts(5))
    ]
    reasons = set()
    for item, future in [(item, served.client.submit(item)) for item in items]:
        answer = future.result(ANSWER_S)
        reasons.add(answer.finish_reason)
        generate: Any = served.whole.generate
        expected = generate(
            torch.tensor([item.prompt]),
            do_sample=False,
            max_new_tokens=30,
            min_new_tokens=9,
            repetition_penalty=PENALTY,
            eos_token_id=list(stopping.stop_ids),
            pad_token_id=0,
        )[0, len(item.prompt) :].tolist()
        assert list(answer.tokens) == expected
        assert answer.stop_reason == (expected[-1] if answer.finish_reason == "stop" else None)
        assert len(expected) > 9
    assert "stop" in reasons


def test_sampled_options_do_not_depend_on_who_shares_the_batch(served: Served) -> None:
    """Requests of all kinds at once: each gets what the whole model gives it alone with its seed."""
    kinds = (
        Sampling(temperature=1.2, min_p=0.02, seed=1),
        Sampling(temperature=0.8, top_p=0.9, repetition_penalty=PENALTY, seed=2),
        Sampling(temperature=1.5, top_k=30, min_tokens=20, logprobs=3, seed=3),
        Sampling(repetition_penalty=0.7),
        Sampling(logprobs=1),
        Sampling(),
    )
    stop_ids = tuple(range(3, 40))
    items = [
        GenerateItem(prompt, 25, sampling=kinds[number % len(kinds)], stopping=Stopping(stop_ids=stop_ids))
        for number, prompt in enumerate(served.prompts(12))
    ]
    ends = (*stop_ids, *served.client._connection.tokenization.card.eos_token_ids)
    for item, future in [(item, served.client.submit(item)) for item in items]:
        answer = future.result(ANSWER_S)
        assert_tokens_equal(
            served.whole, [int(token) for token in item.prompt], answer.tokens, item.sampling, ends
        )
        assert all(token not in ends for token in answer.tokens[: item.sampling.min_tokens])
        assert len(answer.logprobs) == (len(answer.tokens) if item.sampling.logprobs else 0)


@torch.no_grad()
def test_logprobs_are_the_whole_models(served: Served) -> None:
    """Of each token and of the most likely ones, before temperature and penalty, in the stream as in the answer."""
    (prompt,) = served.prompts(1)
    sampling = Sampling(temperature=2.0, repetition_penalty=PENALTY, logprobs=4, seed=9)
    with served.client.stream(prompt, 12, sampling=sampling, ignore_eos=True, timeout=ANSWER_S) as stream:
        told = [entry for chunk in stream for entry in chunk.logprobs]
    answer = stream.future.result(0)
    assert tuple(told) == answer.logprobs
    logits_TV = served.whole(torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 : -1]
    for entry, token, logprobs_V in zip(told, answer.tokens, logits_TV.log_softmax(-1), strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
        best = logprobs_V.topk(4).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=1e-4)


def test_a_stop_string_ends_it_on_the_stage_worker(served: Served) -> None:
    """With the token that completes it; no more are computed, and the text ends before it."""
    sampling = Sampling(repetition_penalty=PENALTY)
    whole = served.client.generate([5], 20, sampling=sampling, ignore_eos=True, timeout=ANSWER_S)
    words = whole.text.split()
    string = " ".join(words[6:9])
    needed = next(count for count in range(20) if string in " ".join(words[:count]))
    stopped = served.client.generate(
        [5],
        20,
        sampling=sampling,
        stopping=Stopping(stop_strings=("nothing", string)),
        ignore_eos=True,
        timeout=ANSWER_S,
    )
    assert whole.tokens[: len(stopped.tokens)] == stopped.tokens
    assert (len(stopped.tokens), stopped.finish_reason, stopped.stop_reason) == (needed, "stop", string)
    assert stopped.text == whole.text[: whole.text.index(string)]
