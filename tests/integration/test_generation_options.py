"""What ends a generation and what is said of its tokens, from a client through the broker and back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from integration.scripted_worker import ScriptedWorker, logprob_of
from lemix import AsyncClient, Client, GenerateItem, Sampling, Stopping
from lemix.replies import TokensGenerated
from lemix_common.errors import BadInput, QueueFull
from lemix_common.store.items import ChosenTokens, Items

SOON_S = 10.0
NewClient = Callable[..., Client]


def stop_at(*strings: str, include: bool = False) -> Stopping:
    """Stop strings."""
    return Stopping(stop_strings=strings, include_stop=include)


@pytest.mark.parametrize("include", [False, True])
def test_a_stream_is_its_final_text_and_never_shows_a_stop_that_begins(
    client: Client, worker: ScriptedWorker, include: bool
) -> None:
    """Though stop and characters are spread over tokens; the tokens are all there, and the reason is named."""
    worker.most_tokens = 9
    stream = client.stream("ab né😀!", 32, stopping=stop_at("é😀!", "bx", include=include), timeout=SOON_S)
    worker.work()
    early = [next(stream).text for _ in range(9)]
    assert early == ["a", "", "b ", "n", "", "", "", "", ""]  # b and é may become stops
    worker.most_tokens = None
    worker.work()
    late = list(stream)
    answer = stream.future.result(0)
    assert answer.text == ("ab né😀!" if include else "ab n")
    assert "".join([*early, *(chunk.text for chunk in late)]) == answer.text
    assert (answer.finish_reason, answer.stop_reason, len(answer.tokens)) == ("stop", "é😀!", 11)
    assert (late[-1].finish_reason, late[-1].stop_reason) == ("stop", "é😀!")


def test_any_client_gets_the_same_text(client: Client, new_client: NewClient, worker: ScriptedWorker) -> None:
    """One that asks for it by its id too, though it knows of the stops from the item only."""
    first = client.submit(
        GenerateItem("abcabc", 12, stopping=stop_at("ca"), sampling=Sampling(min_tokens=4), item_id="mine")
    )
    worker.work()
    assert first.result(SOON_S).text == "abcab"
    assert new_client().result("mine", SOON_S) == first.result(0)


def test_a_stop_id_is_a_token_but_no_text(client: Client, worker: ScriptedWorker) -> None:
    """Unless it is to be included."""
    with worker.runs():
        for include, text in ((False, "a"), (True, "ab")):
            (stop,) = client._connection.tokenization.reference_ids("b")
            stopping = Stopping(stop_ids=(stop,), include_stop=include)
            answer = client.generate("abc", 9, stopping=stopping, timeout=SOON_S)
            assert (answer.text, answer.stop_reason, answer.tokens[-1]) == (text, stop, stop)


def test_logprobs_come_with_the_tokens(client: Client, worker: ScriptedWorker) -> None:
    """One entry a token, in the stream as in the answer; none where none were asked for."""
    asked = Sampling(logprobs=2)
    with worker.runs():
        chunks = list(client.stream([65, 66], 3, sampling=asked, timeout=SOON_S))
        answer = client.generate([65, 66], 3, sampling=asked, timeout=SOON_S)
        plain = client.generate([65, 66], 3, timeout=SOON_S)
    assert answer.logprobs == (logprob_of(65), logprob_of(66), logprob_of(65))
    assert [chunk.logprobs for chunk in chunks] == [*((entry,) for entry in answer.logprobs), ()]
    assert plain.logprobs == ()


def test_logprobs_whose_replies_were_lost_come_from_the_items_own_list(
    client: Client, worker: ScriptedWorker
) -> None:
    """As tokens do."""
    client._inbox.audit_every_s = 0.05
    stream = client.stream([65, 66, 67], 3, sampling=Sampling(logprobs=1), timeout=SOON_S)
    worker.broker.client.hdel(worker.broker.keys.item(stream.item_id), "client")
    worker.work()
    told = [(chunk.tokens, chunk.logprobs) for chunk in stream if chunk.tokens]
    assert [token for tokens, _ in told for token in tokens] == [65, 66, 67]
    assert [entry for _, entries in told for entry in entries] == [logprob_of(65 + i) for i in range(3)]


def test_logprobs_that_are_heard_twice_stay_with_their_tokens(client: Client) -> None:
    """Of a reply that overlaps what was heard, only the rest is told."""
    stream = client.stream([65], 4, sampling=Sampling(logprobs=1), timeout=SOON_S)
    for index, tokens in ((0, (65, 66)), (1, (66, 67)), (0, (65,))):
        logprobs = tuple(map(logprob_of, tokens))
        stream._item.add_tokens(
            TokensGenerated(
                item=stream.item_id, index=index, tokens=tokens, weights_version="0.0", logprobs=logprobs
            )
        )
    assert [next(stream).logprobs for _ in range(2)] == [(logprob_of(65), logprob_of(66)), (logprob_of(67),)]
    stream.close()


def test_appended_logprobs_are_kept_once_beside_their_tokens(client: Client, worker: ScriptedWorker) -> None:
    """A repeated call adds only what is new, a later attempt is given what there is; they expire with the tokens."""
    worker.most_tokens = 0
    future = client.submit(GenerateItem([65], 4, sampling=Sampling(logprobs=1)))
    worker.work()
    (started,) = worker._stalled
    items, texts = Items(worker.broker), [logprob_of(token).to_text() for token in (65, 66, 67)]
    calls = [
        items.append_tokens([ChosenTokens(started.item, started.attempt, 0, (65, 66), tuple(texts[:2]))]),
        items.append_tokens([ChosenTokens(started.item, started.attempt, 1, (66, 67), tuple(texts[1:]))]),
    ]
    assert worker.broker.call_many([*calls, *calls]) == [["ok"]] * 4
    assert (items.tokens(started.item), items.logprobs(started.item)) == ([65, 66, 67], texts)
    entries: Any = worker.broker.client.xrange(client._inbox.stream)
    said = [json.loads(fields["said"]) for _, fields in entries if fields.get("event") == "tokens"]
    told = [logprobs for ((_, _, _, _, logprobs),) in said]
    assert told == [list(map(json.loads, texts[:2])), [json.loads(texts[2])]]
    (again,), _ = items.start(
        0,
        "scripted",
        [
            worker.broker.read_group(
                worker.broker.keys.work(0), "stage0", "scripted", block_s=0.001, count=1, after="0"
            )[0]
        ],
    )
    assert (again.tokens, again.logprobs) == ((65, 66, 67), tuple(texts))
    future.cancel()
    assert worker.broker.client.ttl(worker.broker.keys.item_logprobs(started.item)) > 0


def test_several_answers_to_one_prompt(client: Client, worker: ScriptedWorker) -> None:
    """Each is an item with a seed and a name of its own."""
    with worker.runs():
        answers = client.generate("ab", 2, n=3, sampling=Sampling(seed=7), item_id="mine", timeout=SOON_S)
    assert [answer.text for answer in answers] == ["ab"] * 3
    fields = [Items(worker.broker).get(f"mine.{number}") for number in range(3)]
    assert [item["seed"] for item in fields] == ["7", "8", "9"]


def test_several_answers_are_awaited_together(client: Client, worker: ScriptedWorker) -> None:
    """With the same options; a stream has them too."""

    async def talk() -> list[str]:
        asynchronous = AsyncClient(client=client)
        answers = await asynchronous.generate("abc", 9, n=2, stopping=stop_at("c"), timeout=SOON_S)
        stream = asynchronous.stream("abc", 9, stopping=stop_at("c"), timeout=SOON_S)
        return [answer.text for answer in answers] + ["".join([chunk.text async for chunk in stream])]

    with worker.runs():
        assert asyncio.run(talk()) == ["ab", "ab", "ab"]


def test_answers_that_do_not_fit_into_the_queue_are_none(client: Client) -> None:
    """Those queued before the refused one are cancelled, unless their caller named them."""
    for _ in range(48):
        client.submit(GenerateItem([1], 1))
    with pytest.raises(QueueFull):
        client.submit_answers(GenerateItem([1], 1), 3)
    assert client.status()["totals"]["cancelled"] == 2
    with pytest.raises(QueueFull):
        client.submit_answers(GenerateItem([1], 1, item_id="mine"), 3)
    assert client.status()["totals"]["cancelled"] == 2


def test_nothing_is_queued_of_bad_input(client: Client) -> None:
    """Not even the first of several answers."""
    for item, n in ((GenerateItem([1], 0), 2), (GenerateItem([1], 1), 0), (GenerateItem([256], 1), 2)):
        with pytest.raises(BadInput):
            client.submit_answers(item, n)
    assert client.status()["totals"].get("submitted", 0) == 0
