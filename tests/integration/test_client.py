from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from integration.places import Place, Reopening
from integration.scripted_worker import BYTES_TOKENIZER, MODEL, ScriptedWorker
from lemix import Chunk, Client, GenerateItem, Generation, Score, ScoreItem, Trained, TrainItem
from lemix.replies import Reply, TokensGenerated
from lemix_common.clock import ManualClock, wait_until
from lemix_common.errors import (
    BadInput,
    ItemCancelled,
    ItemFailed,
    ItemUnknown,
    OverLong,
    QueueFull,
    ShuttingDown,
    TokenizerMismatch,
    WaitTimeout,
)
from lemix_common.store.cluster import Cluster
from lemix_common.store.items import Items

SOON_S = 10.0
NewClient = Callable[..., Client]


def test_a_score_names_its_weights(client: Client, worker: ScriptedWorker) -> None:
    """A score has the reference's loss, each token's log-probability and the version that said so."""
    future = client.submit(ScoreItem([1, 2], [10, 30]))
    worker.work()
    assert future.result(SOON_S) == Score(loss=0.2, logprobs=(-0.1, -0.3), weights_version="0.0")


def test_a_generation_is_decoded_by_the_client(client: Client, worker: ScriptedWorker) -> None:
    """Text comes back as text."""
    with worker.runs():
        answer = client.generate("né", 6, timeout=SOON_S)
    assert (answer.text, answer.finish_reason, answer.weights_version) == ("néné", "length", "0.0")


def test_a_stream_never_shows_half_a_character(client: Client, worker: ScriptedWorker) -> None:
    """Each token comes once, in order, and the pieces of text are whole characters that add up to the answer."""
    stream = client.stream("né😀", 14, timeout=SOON_S)
    worker.work()
    chunks = list(stream)
    assert [token for chunk in chunks for token in chunk.tokens] == list(stream.future.result(0).tokens)
    assert [chunk.index for chunk in chunks] == list(range(15))
    assert [chunk.text for chunk in chunks if chunk.text] == ["n", "é", "😀", "n", "é", "😀"]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 14 + ["length"]


def test_a_stream_shows_tokens_before_the_end(client: Client, worker: ScriptedWorker) -> None:
    """The first chunk is there while the item still runs."""
    worker.most_tokens = 2
    stream = client.stream([65, 66], 4, timeout=SOON_S)
    worker.work()
    assert next(stream) == Chunk(index=0, tokens=(65,), text=client_text(65), weights_version="0.0")
    assert not stream.future.done()
    worker.most_tokens = None
    worker.work()
    assert [token for chunk in stream for token in chunk.tokens] == [66, 65, 66]


def test_a_stream_left_early_cancels_its_item(client: Client, worker: ScriptedWorker) -> None:
    """What nobody reads isn't computed to its end."""
    worker.most_tokens = 1
    with client.stream([65], 9, timeout=SOON_S) as stream:
        worker.work()
        next(stream)
    with pytest.raises(ItemCancelled):
        stream.future.result(SOON_S)


def test_an_answer_says_when_it_came(client: Client, worker: ScriptedWorker) -> None:
    """By the client's clock: the first token, each token and the end, from submission; the stream says the same."""
    clock = worker.broker.clock = ManualClock(worker.broker.clock.now())
    worker.most_tokens = 1
    stream = client.stream([65, 66], 3, timeout=SOON_S)
    clock.sleep(2.0)
    worker.work()
    chunks = [next(stream)]
    clock.sleep(3.0)
    worker.most_tokens = None
    worker.work()
    chunks += stream
    answer = stream.future.result(0)
    assert answer.token_times_s == pytest.approx((2.0, 5.0, 5.0))
    assert (answer.ttft_s, answer.response_s) == pytest.approx((2.0, 5.0))
    assert [chunk.at_s for chunk in chunks] == pytest.approx([2.0, 5.0, 5.0, 5.0])
    scored = client.submit(ScoreItem([1], [2]))
    clock.sleep(1.0)
    worker.work()
    assert scored.result(SOON_S).response_s == pytest.approx(1.0)


def test_who_did_not_submit_an_item_knows_no_times(new_client: NewClient, worker: ScriptedWorker) -> None:
    """The other client's clock began elsewhere."""
    mine, other = new_client(), new_client()
    future = mine.submit(GenerateItem([65], 2))
    stream = other.stream_item(GenerateItem([65], 2, item_id=future.item_id), timeout=SOON_S)
    worker.work()
    assert {chunk.at_s for chunk in stream} == {None}
    answer = other.result(future.item_id, SOON_S)
    assert isinstance(answer, Generation)
    assert (answer.ttft_s, answer.response_s, answer.token_times_s) == (None, None, ())


def test_a_deadline_counts_from_submission(client: Client, worker: ScriptedWorker) -> None:
    """An item that hasn't ended by then fails, and its caller is told why."""
    clock = worker.broker.clock = ManualClock(worker.broker.clock.now())
    future = client.submit(ScoreItem([1], [2], deadline_s=5.0))
    in_time = client.submit(ScoreItem([1], [2], deadline_s=7.0))
    clock.sleep(6.0)
    assert Items(worker.broker).end_overdue(worker.leader_epoch) == [future.item_id]
    worker.work()
    with pytest.raises(ItemFailed, match="deadline passed while queued"):
        future.result(SOON_S)
    assert in_time.result(SOON_S).loss == 0.02


def test_a_closed_client_cancels_its_streams(new_client: NewClient, worker: ScriptedWorker) -> None:
    """And whatever else was submitted to end with it; the rest goes on, and nothing is known of the client any more."""
    client = new_client()
    stream = client.stream([65], 9)
    bound = client.submit(ScoreItem([1], [2], while_connected=True))
    futures = [client.submit(ScoreItem([1], [2])) for _ in range(2)]
    client.close()
    assert isinstance(stream.future.exception(0), ItemCancelled)
    assert isinstance(bound.exception(0), ItemCancelled)
    for item in (stream.item_id, bound.item_id):
        assert Items(worker.broker).get(item)["state"] == "cancelled"
    assert {Items(worker.broker).get(future.item_id)["state"] for future in futures} == {"queued"}
    keys = worker.broker.keys
    assert not worker.broker.client.exists(
        keys.clients, keys.client_items(client.name), keys.client_alive(client.name)
    )


def test_training_ends_when_the_served_weights_contain_it(client: Client, worker: ScriptedWorker) -> None:
    """An example's answer names its step and a version that has it."""
    first, second = client.train_many([("a", "b"), ("c", "d")])
    worker.work()
    assert first.result(SOON_S) == second.result(SOON_S) == Trained(1, 1.0, "0.1")


def test_flush_waits_for_a_partial_step(client: Client, worker: ScriptedWorker) -> None:
    """A step that isn't full runs on a flush, and the flush returns the version that has it."""
    futures = client.train_many([("a", "b")] * 3)
    with worker.runs():
        assert client.flush(SOON_S) == "0.2"
    assert [future.result(SOON_S).step for future in futures] == [1, 1, 2]


def test_flush_returns_at_once_when_there_is_nothing(client: Client) -> None:
    """Without examples the served version is returned, though nobody works."""
    assert client.flush(SOON_S) == "0.0"


def test_flush_says_that_it_waited_in_vain(client: Client) -> None:
    """Nobody plans: the wait ends by its time-out."""
    client.train("a", "b")
    with pytest.raises(WaitTimeout, match="planned"):
        client.flush(0.05)


def test_an_example_is_checked_before_the_first_is_queued(client: Client) -> None:
    """One bad example among many refuses all, naming the line, and nothing is in a queue."""
    rows = [TrainItem("a", "b"), TrainItem("a", "", where="rows.jsonl:2")]
    with pytest.raises(BadInput, match=r"rows\.jsonl:2: the reference has no tokens"):
        client.train_many(rows)
    assert client.status()["queues"]["examples"]["depth"] == 0


def test_an_over_long_example_can_be_split(client: Client, worker: ScriptedWorker) -> None:
    """Each part is an example with an answer of its own, in order."""
    futures = client.train_many([TrainItem([1] * 4, [2] * 130, over_long="split")])
    with worker.runs():
        client.flush(SOON_S)
    assert [future.result(SOON_S).step for future in futures] == [1, 1, 2]


def test_a_full_queue_refuses_an_item(client: Client) -> None:
    """The fifty-first item is refused with a time to try again; nothing of it is kept."""
    for _ in range(50):
        client.submit(ScoreItem([1], [2]))
    with pytest.raises(QueueFull, match="try again in 1 s"):
        client.submit(ScoreItem([1], [2], item_id="one-too-many"))
    with pytest.raises(ItemUnknown):
        client.result("one-too-many")


def test_a_stopping_cluster_refuses_items(client: Client, worker: ScriptedWorker) -> None:
    """Nothing is accepted any more."""
    Cluster(worker.broker).stop_accepting()
    with pytest.raises(ShuttingDown):
        client.submit(ScoreItem([1], [2]))
    with pytest.raises(BadInput):
        client.submit(ScoreItem([], [2]))


def test_queueing_many_waits_for_a_cluster_that_opens_again(client: Client, worker: ScriptedWorker) -> None:
    """A client that gave up halfway couldn't say which examples to queue again."""
    cluster, settings = Cluster(worker.broker), Cluster(worker.broker).settings()
    clock = worker.broker.clock = Reopening(lambda: cluster.create(settings, MODEL, BYTES_TOKENIZER))
    cluster.stop_accepting()
    assert len(client.train_many([("a", "b"), ("c", "d")])) == 2
    assert clock.num_sleeps == 1
    assert client.status()["queues"]["examples"]["depth"] == 2


def test_a_stopping_cluster_ends_a_flush(client: Client, worker: ScriptedWorker) -> None:
    """What was queued is kept, and won't be served before the cluster opens again: the wait says so at once."""
    client.train("a", "b")
    Cluster(worker.broker).stop_accepting()
    with pytest.raises(ShuttingDown, match="what was submitted is kept"):
        client.flush(SOON_S)
    assert client.status()["queues"]["examples"]["depth"] == 1


def test_an_over_long_request_is_refused_before_the_queue(client: Client) -> None:
    """The error names both lengths; the cluster never sees the item."""
    with pytest.raises(OverLong, match="60 prompt \\+ 9 new tokens = 69, but the model's context is 64"):
        client.submit(GenerateItem([1] * 60, 9))
    assert client.status()["totals"] == {}


def test_a_failed_item_says_why(client: Client, worker: ScriptedWorker) -> None:
    """The reason that the cluster recorded is the error."""
    worker.fail_with = "out of cheese"
    future = client.submit(ScoreItem([1], [2]))
    worker.work()
    with pytest.raises(ItemFailed, match="out of cheese"):
        future.result(SOON_S)


def test_a_cancelled_item_ends_as_cancelled(client: Client, worker: ScriptedWorker) -> None:
    """Cancelling works once, and the item never runs."""
    future = client.submit(ScoreItem([1], [2]))
    assert future.cancel()
    with pytest.raises(ItemCancelled):
        future.result(SOON_S)
    worker.work()
    assert not client.cancel(future.item_id)


def test_a_planned_example_cannot_be_cancelled(client: Client, worker: ScriptedWorker) -> None:
    """An example that is in the weights stays in them."""
    futures = client.train_many([("a", "b"), ("c", "d")])
    worker.work()
    assert not client.cancel(futures[0].item_id)


def test_a_time_out_leaves_the_item_going(client: Client, worker: ScriptedWorker) -> None:
    """The wait ends with advice; the answer comes later."""
    future = client.submit(ScoreItem([1], [10]))
    with pytest.raises(WaitTimeout, match=f"result\\('{future.item_id}'\\)"):
        future.result(0.01)
    worker.work()
    assert isinstance(client.result(future.item_id, SOON_S), Score)


def test_an_id_is_one_item(client: Client, worker: ScriptedWorker) -> None:
    """Submitting an id again, before or after its end, gives the same item's answer and runs nothing twice."""
    item = ScoreItem([1], [10], item_id="mine")
    before = [client.submit(item), client.submit(item)]
    worker.work()
    assert [future.result(SOON_S).loss for future in before] == [0.1, 0.1]
    assert client.submit(item).result(SOON_S).loss == 0.1
    assert client.status()["totals"]["submitted"] == 1


def test_an_id_keeps_its_kind(client: Client) -> None:
    """An id can't be a score and a generation."""
    client.submit(ScoreItem([1], [10], item_id="mine"))
    with pytest.raises(BadInput, match="exists and is to score"):
        client.submit(GenerateItem([1], 3, item_id="mine"))


def test_another_clients_items_can_be_asked_for(new_client: NewClient, worker: ScriptedWorker) -> None:
    """Whoever knows an item's id gets its answer: while it runs, after its end, and with the same text."""
    mine, other = new_client(), new_client()
    worker.most_tokens = 1
    future = mine.submit(GenerateItem("né", 3))
    stream = other.stream_item(GenerateItem("né", 3, item_id=future.item_id), timeout=SOON_S)
    worker.work()
    assert next(stream).tokens == tokens_so_far(worker, stream.item_id)[:1]
    worker.most_tokens = None
    worker.work()
    assert "".join(chunk.text for chunk in stream) == "é"
    assert future.result(SOON_S) == other.result(future.item_id, SOON_S)
    assert new_client().result(future.item_id, SOON_S) == future.result()


def test_an_unknown_item_is_said_to_be_unknown(client: Client) -> None:
    """No waiting for what never was."""
    with pytest.raises(ItemUnknown):
        client.result("nothing", SOON_S)
    with pytest.raises(ItemUnknown):
        client.cancel("nothing")


def test_no_token_is_lost_or_doubled_by_a_broker_restart(
    place: Place, new_client: NewClient, worker: ScriptedWorker
) -> None:
    """The client reads on from the last reply it saw, and an item submitted meanwhile is accepted once."""
    heard: list[Reply] = []
    client = new_client(on_reply=heard.append)
    worker.most_tokens = 2
    stream = client.stream([65, 66, 67], 6, timeout=SOON_S)
    worker.work()
    assert [next(stream).index, next(stream).index] == [0, 1]
    place.outage.begin()
    late: list[Score] = []
    submitting = threading.Thread(target=lambda: late.append(client.score([1], [10], timeout=SOON_S)))
    submitting.start()
    place.outage.end()
    worker.most_tokens = None
    with worker.runs():
        assert [chunk.index for chunk in stream] == [2, 3, 4, 5, 6]
        submitting.join(SOON_S)
    assert late == [Score(0.1, (-0.1,), "0.0")]
    indexes = [reply.index for reply in heard if isinstance(reply, TokensGenerated)]
    assert indexes == list(range(6))
    assert client.status()["totals"]["submitted"] == 2


def test_replies_that_were_trimmed_are_made_up_for(client: Client, worker: ScriptedWorker) -> None:
    """What the reply stream lost before the client read it, the item's own record has: tokens and end."""
    client._inbox.audit_every_s = 0.05
    stream = client.stream([65, 66, 67], 5, timeout=SOON_S)
    worker.broker.client.hdel(
        worker.broker.keys.item(stream.item_id), "client"
    )  # so that no reply is written
    worker.work()
    assert [token for chunk in stream for token in chunk.tokens] == [65, 66, 67, 65, 66]
    assert stream.future.result(SOON_S).tokens == (65, 66, 67, 65, 66)


def test_a_model_that_changed_refuses_old_tokens(client: Client, worker: ScriptedWorker) -> None:
    """A client of the cluster's earlier model is told to open anew; nothing is queued."""
    worker.broker.client.hset(worker.broker.keys.model, "tokenizer_sha256", "another")
    with pytest.raises(TokenizerMismatch, match="open a new Client"):
        client.submit(ScoreItem([1], [2]))


def test_a_closed_client_leaves_nothing(new_client: NewClient, worker: ScriptedWorker) -> None:
    """Its thread and its reply stream are gone; a wait that was going on ends with what to do."""
    client = new_client()
    future = client.submit(ScoreItem([1], [2]))
    client.close()
    assert isinstance(future.exception(0), Exception)
    assert not worker.broker.client.exists(client._inbox.stream)
    wait_until(
        lambda: all(thread.name != "lemix-inbox" for thread in threading.enumerate()),
        what="the inbox's thread is gone",
        timeout_s=SOON_S,
    )


def test_status_is_the_documented_object(client: Client, worker: ScriptedWorker) -> None:
    """Nodes, workers, queues and versions as INTERFACES names them."""
    client.submit(ScoreItem([1], [2]))
    status = client.status()
    assert status["weights_version"] == "0.0"
    assert status["leader"] == "scripted"
    node = status["nodes"][0]
    assert (node["state"], node["stages"][0]["layers"], node["stages"][0]["worker"]) == (
        "ready",
        [0, 3],
        "scripted",
    )
    assert status["queues"]["submissions"]["depth"] == 1
    assert status["workers"][0]["heartbeat_age_s"] is not None
    worker.work()
    assert client.status()["queues"]["submissions"]["depth"] == 0


def client_text(token: int) -> str:
    """What the bytes tokenizer makes of one token."""
    return str(Tokenizer.from_str(BYTES_TOKENIZER).decode([token]))


def tokens_so_far(worker: ScriptedWorker, item_id: str) -> tuple[int, ...]:
    """The tokens that the cluster has of an item."""
    return tuple(Items(worker.broker).tokens(item_id))
