"""Every key a cluster keeps in Redis, spelled here and nowhere else.

All keys of a cluster share one hash tag, so many clusters spread over a Redis Cluster and each one's Lua calls stay on
one shard. `docs/redis.md` says what an operator reads in each.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from lemix_common.errors import SettingsError

_CLUSTER = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names of one cluster."""

    cluster: str = "lemix"

    def __post_init__(self) -> None:
        if not _CLUSTER.fullmatch(self.cluster):
            raise SettingsError(
                f"cluster name {self.cluster!r}: use 1 to 64 letters, digits, '_' or '-' (it becomes a key prefix)"
            )

    @property
    def prefix(self) -> str:
        """What all keys of the cluster begin with; Lua calls build the names below from it."""
        return f"{{{self.cluster}}}:"

    def _key(self, *parts: object) -> str:
        return self.prefix + ":".join(str(part) for part in parts)

    # ---- the cluster
    @property
    def cluster_state(self) -> str:
        """Hash: state (running | stopping), nodes, stages, started_at, generation (of the settings), secret, reason."""
        return self._key("cluster")

    @property
    def settings(self) -> str:
        """Hash: the settings in force, one field each."""
        return self._key("settings")

    @property
    def model(self) -> str:
        """Hash: what a client needs to know of the model (context_length, vocab_size, tokenizer_sha256 …)."""
        return self._key("model")

    @property
    def tokenizer(self) -> str:
        """String: the model's tokenizer.json."""
        return self._key("tokenizer")

    @property
    def profile(self) -> str:
        """Hash: version (of this hash), model, device, source, stages, published_at, profile (all costs, as JSON)."""
        return self._key("profile")

    @property
    def leader(self) -> str:
        """String with expiry: the coordinator that leads."""
        return self._key("leader")

    @property
    def leader_epoch(self) -> str:
        """Counter: raised at each change of leader; every coordinator call carries it."""
        return self._key("leader_epoch")

    @property
    def control(self) -> str:
        """Stream of notices, in the one order every process reads."""
        return self._key("control")

    @property
    def events(self) -> str:
        """Stream of what ran: batches of spans."""
        return self._key("events")

    @property
    def totals(self) -> str:
        """Hash of counters: submitted, done, failed, cancelled, refused, open, slo_kept, slo_counted, training_tax …"""
        return self._key("totals")

    @property
    def metrics(self) -> str:
        """Sorted set: ``PROCESS URL`` of each process's Prometheus page, by when it last said so."""
        return self._key("metrics")

    @property
    def held_out(self) -> str:
        """String: the examples that versions are judged by before they are served, as JSON pairs of token ids."""
        return self._key("held_out")

    # ---- workers and placement
    @property
    def workers(self) -> str:
        """Set: ids of registered workers."""
        return self._key("workers")

    def worker(self, worker: str) -> str:
        """Hash: pid, host, device, address, memory (its limit), memory_used, links (how tensors travel), busy."""
        return self._key("worker", worker)

    def alive(self, worker: str) -> str:
        """String with expiry: the heartbeat, its value the compute loop's progress counter."""
        return self._key("worker", worker, "alive")

    def tensors(self, name: str) -> str:
        """Pub/Sub channel, nothing is kept: tensors to a worker that only the broker leads to."""
        return self._key("tensors", name)

    @property
    def placement_epoch(self) -> str:
        """Counter: raised at each change of a node's placement."""
        return self._key("placement_epoch")

    def node(self, node: int) -> str:
        """Hash: epoch, link_lost, and of each stage its host stage:S, ready:S, version:S, layers:S, training:S."""
        return self._key("node", node)

    def work(self, node: int) -> str:
        """Stream: the items dispatched to a node; its stage 0 is the consumer."""
        return self._key("node", node, "work")

    # ---- items
    @property
    def submissions(self) -> str:
        """Stream: inference items not yet dispatched."""
        return self._key("submissions")

    def item(self, item: str) -> str:
        """Hash: everything about an item."""
        return self._key("item", item)

    def item_payload(self, item: str) -> str:
        """Hash: prompt and reference, as JSON lists of token ids."""
        return self._key("item", item, "payload")

    def item_tokens(self, item: str) -> str:
        """List: the tokens generated so far."""
        return self._key("item", item, "tokens")

    def item_logprobs(self, item: str) -> str:
        """List: these tokens' log-probabilities, each ``[token, logprob, [[token, logprob], …]]``; if asked for."""
        return self._key("item", item, "logprobs")

    def replies(self, client: str) -> str:
        """Stream: what happened to a client's items."""
        return self._key("replies", client)

    @property
    def deadlines(self) -> str:
        """Sorted set: the items that have a deadline and haven't ended, by its time in seconds since 1970."""
        return self._key("deadlines")

    @property
    def clients(self) -> str:
        """Set: the clients that have items which end with them."""
        return self._key("clients")

    def client_items(self, client: str) -> str:
        """Set: the items that are cancelled when this client goes away."""
        return self._key("client", client, "items")

    def client_alive(self, client: str) -> str:
        """String with expiry: the client of such items lives."""
        return self._key("client", client, "alive")

    @property
    def dead_letters(self) -> str:
        """Stream: items given up, each with its reason."""
        return self._key("dead_letters")

    @property
    def failures(self) -> str:
        """Stream: every item that failed, those given up too, each with its reason."""
        return self._key("failures")

    # ---- training
    def run(self, run: str) -> str:
        """Hash: lineage, base (where it began), planned, committed, checkpoint, attempt, members, refused, …."""
        return self._key("run", run)

    def checkpoints(self, run: str) -> str:
        """Hash: version to directory of each checkpoint that can be gone back to (empty: the model's own folder)."""
        return self._key("run", run, "checkpoints")

    def examples(self, run: str) -> str:
        """Stream: the training examples in submission order."""
        return self._key("run", run, "examples")

    def step(self, run: str, step: int) -> str:
        """Hash: what a planned step consists of."""
        return self._key("run", run, "step", step)

    def step_ready(self, run: str, step: int) -> str:
        """Hash: node:stage to what it reported of the step's gradients, in the attempt in progress."""
        return self._key("run", run, "ready", step)

    # ---- versions and operations
    @property
    def versions(self) -> str:
        """Hash: served, draining, preparing."""
        return self._key("versions")

    @property
    def versions_in_flight(self) -> str:
        """Hash: version to the number of items that are on it and haven't ended."""
        return self._key("versions", "in_flight")

    @property
    def version_log(self) -> str:
        """Stream: the versions that were published or held back, each with what it is made of."""
        return self._key("versions", "log")

    def version(self, version: object) -> str:
        """Hash: directory, sha256, step, its operation, held_out_loss, published_at, cleared_at, prepared:N:S."""
        return self._key("version", version)

    @property
    def operations(self) -> str:
        """Set: ids of operations in progress."""
        return self._key("operations")

    def operation(self, operation: str) -> str:
        """Hash: kind, state, what it works on, reason."""
        return self._key("operation", operation)


def lua_names(keys: Keys, body: str) -> str:
    """Lua declarations of the names that ``body`` uses as ``K.name`` or ``K.name(…)``: keys are spelled once."""
    lines = ["local K = {}"]
    for name in sorted(set(re.findall(r"\bK\.(\w+)", body))):
        attribute = inspect.getattr_static(Keys, name)
        if isinstance(attribute, property):
            lines.append(f"K.{name} = '{getattr(keys, name)}'")
        else:
            arguments = [f"a{i}" for i in range(len(inspect.signature(attribute).parameters) - 1)]
            spelled = getattr(keys, name)(*(f"' .. {argument} .. '" for argument in arguments))
            lines.append(f"K.{name} = function({', '.join(arguments)}) return '{spelled}' end")
    return "\n".join(lines)
