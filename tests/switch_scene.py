"""A cluster that serves and learns, and requests that are held between two of their tokens while versions change."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from clusters import InProcessCluster, in_process_cluster
from lemix import Client, Future, GenerateItem, Generation, TrainItem
from lemix.replies import TokensGenerated, read_replies
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.ids import BASE_VERSION
from lemix_common.sampling import GREEDY, Sampling
from lemix_common.settings import ClusterSettings
from lemix_common.store.versions import Versions
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.inbox import Finished
from lemix_stage_worker.model.weights import open_weights
from lemix_stage_worker.serving import Request, Serving
from lemix_stage_worker.worker import Worker
from mortality import KillPoint
from numerics.subjects import GENERATED, random_tensors, write_model
from references import assert_tokens_equal, follow_whole, whole_model, write_number_tokenizer

SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
STEP_EXAMPLES = 2
NEW_TOKENS = 40
SOON_S = 20.0


def write_subject(folder: Path, family: str = "llama") -> Path:
    """A generated model, long enough for `NEW_TOKENS`."""
    config = copy.deepcopy(GENERATED[family])
    config.max_position_embeddings = 128
    return write_number_tokenizer(write_model(folder, config, random_tensors(config)), config.vocab_size)


def settings_of(folder: Path, **changes: object) -> ClusterSettings:
    """Every step is published, and changes the weights a lot."""
    known: dict[str, Any] = {
        "step_examples": STEP_EXAMPLES,
        "checkpoint_every": 1000,
        "learning_rate": 0.05,
        "max_drain_s": 600.0,
        "max_drain_share": 1.0,
    }
    return ClusterSettings(model=str(folder), **(known | changes))


@dataclass
class Holding:
    """Stage 0 takes no notice of a request's next token from where a test holds it until it is let go."""

    after: dict[str, int] = field(default_factory=dict)
    """Items to hold, each when it has so many tokens; and only the first time, not when it is begun again."""
    held: dict[str, Callable[[], None]] = field(default_factory=dict)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between stages 0 and their tokens."""
        take = Serving.token_chosen

        def token_chosen(
            serving: Serving, host: HostedStage, request: Request, token: int, logprob: str
        ) -> None:
            item = request.started.item
            if self.after.get(item) != len(request.tokens):
                take(serving, host, request, token, logprob)
                return
            del self.after[item]
            worker = serving.around
            assert isinstance(worker, Worker)

            def go_on() -> None:
                if serving.requests.get((host.node, item)) is request:
                    take(serving, host, request, token, logprob)
                    serving.hand_out(host)

            self.held[item] = partial(worker.inbox.post, Finished(go_on))

        patch.setattr(Serving, "token_chosen", token_chosen)


@dataclass
class Residence:
    """The most that any stage ever held, looked at after each turn of its worker's loop."""

    versions: int = 0
    weight_buffers: float = 0.0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Look on."""
        turn = Worker.turn

        def look(worker: Worker, *, wait_s: float) -> None:
            turn(worker, wait_s=wait_s)
            for host in worker.hosting.stages.values():
                self.versions = max(self.versions, len(host.versions))
                buffers = host.memory_bytes / host.template.weight_bytes
                self.weight_buffers = max(self.weight_buffers, buffers)

        patch.setattr(Worker, "turn", look)


@dataclass
class Switching:
    """The running cluster, its client, and the whole model as each version has it."""

    cluster: InProcessCluster
    client: Client
    folder: Path
    holding: Holding
    models: dict[str, PreTrainedModel] = field(default_factory=dict)

    @property
    def broker(self) -> Broker:
        """The cluster's."""
        return self.cluster.broker

    def hold(self, item: GenerateItem, *, tokens: int) -> Future[Generation]:
        """Submit a request and wait until it is held with so many tokens, the next one chosen."""
        self.holding.after[str(item.item_id)] = tokens
        future = self.client.submit(item)
        wait_until(lambda: future.item_id in self.holding.held, what="it is held", timeout_s=SOON_S)
        return future

    def let_go(self, *futures: Future[Generation]) -> None:
        """Have them go on."""
        for future in futures:
            self.holding.held.pop(future.item_id)()

    def submit_step(self, name: str) -> list[Future[Any]]:
        """Submit a step's examples; another name, other examples."""
        draw = random.Random(name)
        texts = [[draw.randrange(3, 61) for _ in range(16)] for _ in range(STEP_EXAMPLES)]
        return [
            self.client.submit(TrainItem(ids[:8], ids[8:], item_id=f"{name}-{index}"))
            for index, ids in enumerate(texts)
        ]

    def publish(self, name: str) -> str:
        """Learn a step; returns the version that is served then, when every worker knows of it."""
        for future in self.submit_step(name):
            future.result(SOON_S)
        version = Versions(self.broker).live()["served"]
        self.keep(version)
        wait_until(
            lambda: all(worker.serving.served == version for worker in self.workers),
            what="every worker knows",
            timeout_s=SOON_S,
        )
        return version

    def keep(self, version: str) -> None:
        """Load a live version into a whole model."""
        model = whole_model(self.folder)
        if version != str(BASE_VERSION):
            weights = open_weights(Path(Versions(self.broker).version(version)["directory"]))
            tensors = weights.read(weights.specs)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[name])
        self.models[version] = model

    @property
    def workers(self) -> list[Worker]:
        """Those that live."""
        return [hosted.worker for hosted in self.cluster.workers.values() if hosted.worker is not None]

    def slot_of(self, future: Future[Generation]) -> str:
        """The worker's that drives a request."""
        (slot,) = (
            slot
            for slot, hosted in self.cluster.workers.items()
            if hosted.worker is not None
            and any(item == future.item_id for _, item in hosted.worker.serving.requests)
        )
        return slot

    def finish(self, future: Future[Generation]) -> Generation:
        """Have a request go on to its end, whoever has to be started again for it."""
        self.let_go(future)
        wait_until(
            lambda: self.cluster.replace_dead() == [] and future.done(), what="it has ended", timeout_s=40
        )
        return future.result(0)

    def check(self, item: GenerateItem, answer: Generation) -> None:
        """Each span's tokens are a cold run of its version from there on; each was sent once, with its version."""
        assert len(answer.tokens) == item.max_new_tokens
        assert answer.weights_version == answer.version_spans[0][1]
        begins = [begin for begin, _ in answer.version_spans]
        assert begins[0] == 0
        assert begins == sorted(set(begins))
        for (begin, version), (end, _) in pairwise([*answer.version_spans, (len(answer.tokens), "")]):
            before = [*_ids(item), *answer.tokens[:begin]]
            assert_tokens_equal(self.models[version], before, answer.tokens[begin:end], item.sampling)
        versions = [version for _, version in self.sent(str(item.item_id))]
        assert [token for token, _ in self.sent(str(item.item_id))] == list(answer.tokens)
        ends = [*begins[1:], len(answer.tokens)]
        assert versions == [
            version
            for (begin, version), end in zip(answer.version_spans, ends, strict=True)
            for _ in range(begin, end)
        ]

    def would_differ(self, item: GenerateItem, answer: Generation, begin: int, version: str) -> bool:
        """Whether a cold run of another version from there on gives other tokens, so that `check` can tell."""
        before, tokens = [*_ids(item), *answer.tokens[:begin]], answer.tokens[begin:]
        chosen = follow_whole(self.models[version], before, tokens, item.sampling)
        return [token for token, _ in chosen] != list(tokens)

    def sent(self, item: str) -> list[tuple[int, str]]:
        """The tokens the client was sent, in order, each with its version."""
        entries: Any = self.broker.client.xrange(self.broker.keys.replies(self.client.name))
        replies = [reply for _, fields in entries if "event" in fields for reply in read_replies(fields)]
        return [
            (token, reply.weights_version)
            for reply in replies
            if isinstance(reply, TokensGenerated) and reply.item == item
            for token in reply.tokens
        ]


def _ids(item: GenerateItem) -> list[int]:
    assert not isinstance(item.prompt, str)
    return list(item.prompt)


def requests(**rules: object) -> list[GenerateItem]:
    """A greedy and a sampled request, with such rules."""
    name = "-".join(map(str, rules.values()))
    plain = GenerateItem([3, 4, 5], NEW_TOKENS, ignore_eos=True)
    return [
        replace(plain, **rules, sampling=sampling, item_id=f"{kind}-{name}")  # type: ignore[arg-type]
        for kind, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))
    ]


@contextmanager
def switching(
    broker: Broker,
    folder: Path,
    data_dir: Path,
    patch: pytest.MonkeyPatch,
    kill_points: Mapping[str, KillPoint] | None = None,
    **changes: object,
) -> Iterator[Switching]:
    """Such a cluster."""
    holding = Holding()
    holding.install(patch)
    settings = settings_of(folder, **changes)
    with in_process_cluster(broker, settings, data_dir, kill_points) as (cluster, client):
        scene = Switching(cluster, client, folder, holding)
        scene.keep(str(BASE_VERSION))
        yield scene
