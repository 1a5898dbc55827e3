"""A coordinator and worker in one, which answers by arithmetic through the real calls of the store.

A generation repeats its prompt, until something ends it; log-probabilities are minus a hundredth of the token ids; a
step's loss is its number. Nothing happens but in `work`, so a test decides when.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lemix_common.broker import Broker, Entry
from lemix_common.ids import BASE_VERSION
from lemix_common.logprobs import TokenLogprob
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import STAGE_0, Call, ChosenTokens, Items, StartedItem
from lemix_common.store.training import GradientReport, PlannedStep, Training
from lemix_common.store.versions import Versions
from lemix_stage_worker.decoding import lazy_decoder
from lemix_stage_worker.finishing import finishing_of


def bytes_tokenizer() -> str:
    """A tokenizer whose tokens are bytes, so that most characters beyond ASCII come in halves."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


BYTES_TOKENIZER = bytes_tokenizer()
MODEL: dict[str, object] = {
    "family": "llama",
    "context_length": 64,
    "vocab_size": 256,
    "bos_token_id": "",
    "eos_token_ids": "[]",
    "num_layers": 4,
    "tokenizer_sha256": hashlib.sha256(BYTES_TOKENIZER.encode()).hexdigest(),
}
NAME = "scripted"
PAUSE_S = 0.005
SPAN_S = 0.1


@dataclass
class ScriptedWorker:
    """Node 0's only stage."""

    broker: Broker
    fail_with: str = ""
    """Reason with which the next items fail."""
    tokens_at_once: int = 1
    most_tokens: int | None = None
    """Tokens after which generations stall, for the test to look at them half done."""
    leader_epoch: int = 0
    is_placed: bool = False
    _stalled: list[StartedItem] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def join(self) -> None:
        """Become the leader, register as a worker, be placed and ready."""
        cluster = Cluster(self.broker)
        epoch = cluster.lead(NAME, expiry_s=3600)
        assert epoch is not None
        self.leader_epoch = epoch
        cluster.register(NAME, {"pid": 1, "device": "cpu", "slot": 0, "memory": 1000}, expiry_s=3600)
        cluster.place(epoch, 0, [NAME])
        placed = int(cluster.nodes(1)[0]["epoch"])
        cluster.stage_ready(
            NAME,
            node=0,
            stage=0,
            epoch=placed,
            training=BASE_VERSION,
            versions=["0.0"],
            layers=[0, 3],
            memory_bytes=10,
        )
        self.is_placed = True

    def work(self) -> None:
        """Do everything there is to do now."""
        items = Items(self.broker)
        for pending in (True, False):  # pending: the broker's answer was lost
            for entry in items.submitted(NAME, count=100, pending=pending):
                self.broker.call_many([items.dispatch(self.leader_epoch, entry, 0)])
        started, _ = items.start(0, NAME, self._pull())
        unfinished, self._stalled = [*self._stalled, *started], []
        for item in unfinished:
            self._answer(items, item)
        self._train()

    @contextmanager
    def runs(self) -> Iterator[None]:
        """Work in a thread of its own meanwhile."""
        self._stopped.clear()
        self._thread = threading.Thread(target=self._work_on, name="scripted-worker")
        self._thread.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work_on(self) -> None:
        while not self._stopped.wait(PAUSE_S):
            self.work()

    def _pull(self) -> list[Entry]:
        stream, known = self.broker.keys.work(0), {item.entry for item in self._stalled}
        again = self.broker.read_group(stream, STAGE_0, NAME, block_s=0.001, count=100, after="0")
        fresh = self.broker.read_group(stream, STAGE_0, NAME, block_s=0.001, count=100)
        return [entry for entry in again if entry.id not in known] + fresh

    def _answer(self, items: Items, item: StartedItem) -> None:
        if self.fail_with:
            calls = [items.fail(item, 0, self.fail_with)]
        elif item.kind == "score":
            logprobs = [-token / 100 for token in item.reference]
            loss = -sum(logprobs) / len(logprobs)
            calls = [items.complete(item, 0, {"loss": loss, "logprobs": logprobs})]
        else:
            calls = self._generate(items, item)
        self.broker.call_many(calls)
        self._report(item)

    def _generate(self, items: Items, item: StartedItem) -> list[Call]:
        decode = lazy_decoder(Cluster(self.broker).tokenizer)
        finishing = finishing_of(item.fields, eos_ids=(), tokens=(), decode=decode)
        tokens: list[int] = []
        while finishing.finish is None and len(tokens) != self.most_tokens:
            tokens.append(item.prompt[len(tokens) % len(item.prompt)])
            finishing.add(tokens[-1])
        texts = (
            [logprob_of(token).to_text() for token in tokens]
            if item.fields.get("logprobs", "0") != "0"
            else []
        )
        at_once = self.tokens_at_once
        calls = [
            items.append_tokens(
                [
                    ChosenTokens(
                        item.item,
                        item.attempt,
                        at,
                        tuple(tokens[at : at + at_once]),
                        tuple(texts[at : at + at_once]),
                    )
                ]
            )
            for at in range(0, len(tokens), at_once)
        ]
        if finishing.finish is None:
            self._stalled.append(item)
        else:
            calls.append(items.complete(item, 0, finishing.result(tokens, texts)))
        return calls

    def _report(self, item: StartedItem) -> None:
        """Every item takes a tenth of a second, a fifth of it behind training."""
        now = self.broker.clock.now()
        span = {
            "node": 0,
            "stage": 0,
            "worker": NAME,
            "cat": "prefill",
            "item": item.item,
            "version": item.version,
        }
        span |= {"start": now - SPAN_S, "end": now, "blocked_s": SPAN_S / 5, "busy": True}
        spans = json.dumps([span])
        self.broker.again(lambda: self.broker.client.xadd(self.broker.keys.events, {"spans": spans}))

    def _train(self) -> None:
        training = Training(self.broker, MAIN_RUN)
        run = training.state()
        queued = training.queued_examples(2)
        flushed = [entry for entry in queued if _order(entry.id) <= _order(next(iter(run.flushes), "0-0"))]
        chosen = queued if len(queued) == 2 else flushed
        if not chosen:
            return
        step = PlannedStep(
            run=MAIN_RUN,
            step=run.planned + 1,
            items=tuple(entry.fields["item"] for entry in chosen),
            cuts=(1,) * len(chosen),
            shards=tuple(range(len(chosen))),
            reference_tokens=1,
            learning_rate=0.1,
            weight_decay=0.0,
            seed=0,
        )
        training.plan(self.leader_epoch, step, cursor=chosen[-1].id)
        epoch = int(Cluster(self.broker).nodes(1)[0]["epoch"])
        training.start_step(
            self.leader_epoch,
            step.step,
            weights=step.step - 1,
            members=[0],
            epochs=[epoch],
            shard_nodes=[0],
            seen=training.state(),
        )
        attempt = training.state().attempt
        ready = training.gradients_ready(
            step.step,
            attempt,
            node=0,
            stage=0,
            report=GradientReport(losses={0: float(step.step)}, squares=(1.0,)),
        )
        self.broker.call_many([ready])
        self._publish(step.step, epoch)

    def _publish(self, step: int, epoch: int) -> None:
        versions, operation, version = Versions(self.broker), f"publish-{step}", f"0.{step}"
        versions.open(operation, "publish", run=MAIN_RUN, root="", writers=[0], epochs=[epoch])
        versions.write_shards(operation)
        versions.prepare(operation, "", "", written=versions.operation(operation)["directory"])
        versions.prepared(version, node=0, stage=0, epoch=epoch)
        assert versions.publish(operation) in {"ok", "stale"}  # stale: done, but the broker's answer was lost
        versions.retire(self.leader_epoch)


def logprob_of(token: int) -> TokenLogprob:
    """What this worker thinks of a token, and of the one before it."""
    return TokenLogprob(token, -token / 100, ((token - 1, -token / 200), (token, -token / 100)))


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))
