"""The settings of a cluster: one small frozen value, read once, refusing what it doesn't know.

They come from a TOML file (``--config``), then ``LEMIX_*`` environment variables, then the command line, later ones
winning. `lemix up` publishes them in the cluster's ``settings`` hash, where the services read theirs.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lemix_common.errors import SettingsError
from lemix_common.schedules.orders import SCHEDULES

POLICIES = (
    *("naive-mix", "separate", "random", "separate-dynamic", "luf", "jsq", "naive-mix+", "random+", "luf+"),
    *("lemix-prototype", "lemix-paper", "lemix"),
)
POLICY_PLUGINS = "lemix.policies"
"""Entry-point group of other policies."""
PREFERENCES = ("balanced", "nodes", "speed")
OPTIMIZERS = ("adamw", "sgd")
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
UPDATE_RULES = ("finish", "rebuild")
REPLICAS = ("allreduce", "independent")
ORDERS = ("urgency", "fifo")
BATCHING_RULES = ("iteration", "paper")
DTYPES = ("", "float32", "bfloat16", "float64")
EMULATED = "emulated:"
"""What the name of a device begins with that only waits; the file of its profile follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What a cluster is made of and how it behaves."""

    model: str = ""
    """Folder of a Hugging Face model, or its hub id."""
    nodes: int = 1
    """Pipeline replicas of the model."""
    stages: int = 1
    """Stages of each node."""
    workers: int = 0
    """Worker processes that `lemix up` starts; 0: one a stage."""
    policy: str = "naive-mix"
    """Where items run: naive-mix, separate, random, jsq, luf, lemix or another one of docs/scheduling.md."""
    prefer: str = "balanced"
    """What `lemix` gives most for where it must choose: balanced, nodes (few are used) or speed."""
    slo_s: float = 0.0
    """Seconds in which a request is to end; 0: five times what it takes on an idle node, if a profile says that."""
    replicas: str = "allreduce"
    """allreduce: nodes learn one model; independent: each learns its share alone, as in the LeMix paper (studies)."""
    training_share: float = 0.5
    """For `separate`: the share of nodes that train."""
    step_examples: int = 8
    """Training examples of one optimizer step, at most."""
    step_tokens: int = 0
    """Tokens of one optimizer step, at most; 0: only examples are counted."""
    microbatches: int = 0
    """Microbatches that a step's examples are packed into, of about as many tokens each; 0: see `microbatch_tokens`."""
    microbatch_tokens: int = 0
    """Tokens that are packed into one microbatch, at most; 0: each example is one of its own."""
    schedule: str = "1f1b"
    """Which stage does what when in a step: s-pp, gpipe, 1f1b, interleaved, zero-bubble or a-pp."""
    order: str = "urgency"
    """What a stage computes next: by urgency (decode, prefill, training), or fifo, as it comes, as the paper does."""
    min_training_share: float = 0.05
    """Of the time in which a stage has both requests and training to compute, what training gets at least."""
    max_training_tax: float = 0.0
    """The next step waits while requests that ended in the last 5 s waited more for training (0.05: 5 %); 0: never."""
    activation_bytes: int = 0
    """What a stage may hold of a step's microbatches on their way, at most; 0: as much as the schedule asks for."""
    recompute: bool = False
    """Keep only the inputs of layers for the backward and compute the rest again: less memory, 38 % more time."""
    dtype: str = ""
    """What weights are computed in: float32, bfloat16 (trained with float32 masters) or float64; empty: the model's."""
    device: str = "cpu"
    """Where workers compute: cpu, cuda (all GPUs by turns), cuda:N, auto (a GPU, if any) or emulated:PROFILE."""
    max_step_wait_s: float = 0.0
    """Plan a partial step when its oldest example has waited this long; 0: only on flush."""
    learning_rate: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    optimizer: str = "adamw"
    """adamw or sgd."""
    learning_rate_schedule: str = "constant"
    """After the warm-up: constant, or linear or cosine down to 0 at step `schedule_steps`."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its full value."""
    schedule_steps: int = 0
    """The step at which a linear or cosine learning rate reaches 0."""
    max_gradient_norm: float = 0.0
    """Gradients are scaled down to this norm, taken over all parameters; 0: never."""
    virtual_shards: int = 4
    """Fixed parts of a step whose gradients are added in order, so that the sum doesn't depend on the nodes."""
    seed: int = 0
    """Seed of whatever is random: the random policy, sampling without a seed of its own."""
    publish_every: int = 1
    """Committed steps between published versions."""
    gate_file: str = ""
    """JSONL file of held-out examples: what does worse on them than the served version isn't served; empty: no gate."""
    gate_margin: float = 0.0
    """By how much a version's held-out loss (nats a token) may be above the served one's."""
    on_update: str = "finish"
    """What a running request does when a newer version is served, unless it says so itself: finish or rebuild."""
    max_drain_s: float = 30.0
    """How long the next version waits for the last requests of an older one; then these go on upon the served one."""
    max_drain_share: float = 0.05
    """Of the time, in which requests of two versions may take turns at most: the next one waits; 1: it doesn't."""
    checkpoint_every: int = 50
    """Committed steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk."""
    max_queue: int = 10_000
    """Accepted items that have not ended; more are refused with QueueFull."""
    max_running: int = 16
    """Requests that run on a node at a time."""
    batching: str = "iteration"
    """How they share forward passes: iteration (continuous, prompts in chunks), or paper, the LeMix paper's rule."""
    max_batch_tokens: int = 256
    """Tokens of one forward pass, at most."""
    max_block_ms: float = 20.0
    """What others may add to the time between two tokens: prompts are cut into chunks that take about so long."""
    batch_wait_ms: float = 10.0
    """With paper batching: how long a node without requests waits for more than one."""
    kv_bytes: int = 2**30
    """Keys and values that a stage may hold, at most; less if `max_running` whole contexts take less."""
    max_deliveries: int = 5
    """Times in a row that an item may lose its stages without having got further, before it is dead-lettered."""
    result_ttl_s: float = 3600.0
    """How long results can be asked for."""
    heartbeat_expiry_s: float = 3.0
    """A worker that was silent for this long is dead."""
    client_expiry_s: float = 10.0
    """A client that was silent for this long is gone: its streams, and what else ends with it, are cancelled."""
    takeover_after_s: float = 20.0
    """A lost stage waits this long for a fresh worker, then a living one hosts it too."""

    def __post_init__(self) -> None:
        for name in (
            "nodes", "stages", "step_examples", "virtual_shards", "publish_every", "checkpoint_every",
            "keep_checkpoints", "max_queue", "max_running", "max_batch_tokens", "kv_bytes", "max_deliveries",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "workers",
            "step_tokens",
            "microbatches",
            "microbatch_tokens",
            "activation_bytes",
            "seed",
            "weight_decay",
            "max_step_wait_s",
            "gate_margin",
            "max_drain_s",
            "warmup_steps",
            "max_gradient_norm",
            "max_training_tax",
            "batch_wait_ms",
            "slo_s",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in (
            "learning_rate",
            "result_ttl_s",
            "heartbeat_expiry_s",
            "client_expiry_s",
            "takeover_after_s",
        ):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        _require(
            self.policy in POLICIES or self.policy in _plugged_in(),
            "policy",
            self.policy,
            "one of " + ", ".join(POLICIES),
        )
        _require(self.prefer in PREFERENCES, "prefer", self.prefer, "one of " + ", ".join(PREFERENCES))
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, "one of " + ", ".join(OPTIMIZERS))
        rules = " or ".join(UPDATE_RULES)
        _require(self.on_update in UPDATE_RULES, "on_update", self.on_update, rules)
        self._check_schedule()
        schedule, known = self.learning_rate_schedule, LEARNING_RATE_SCHEDULES
        _require(schedule in known, "learning_rate_schedule", schedule, "one of " + ", ".join(known))
        _require(
            schedule == "constant" or self.schedule_steps > self.warmup_steps,
            "schedule_steps",
            self.schedule_steps,
            f"above warmup_steps ({self.warmup_steps}) with a {schedule} learning rate",
        )
        _require(self.replicas in REPLICAS, "replicas", self.replicas, "one of " + ", ".join(REPLICAS))
        _require(
            self.replicas == "allreduce" or not self.max_gradient_norm,
            "max_gradient_norm",
            self.max_gradient_norm,
            "0 with independent replicas, which have no common norm",
        )
        _require(
            self.batching in BATCHING_RULES, "batching", self.batching, "one of " + ", ".join(BATCHING_RULES)
        )
        _require(self.order in ORDERS, "order", self.order, "one of " + ", ".join(ORDERS))
        share = self.max_drain_share
        _require(0 < share <= 1, "max_drain_share", share, "above 0, at most 1")
        share = self.min_training_share
        _require(0 <= share <= 0.9, "min_training_share", share, "between 0 and 0.9")
        _require(0 < self.training_share < 1, "training_share", self.training_share, "between 0 and 1")
        if self.policy.startswith("separate"):
            _require(
                self.nodes >= 2,
                "nodes",
                self.nodes,
                f"at least 2 with policy {self.policy} (one serves, one trains)",
            )
        _require(self.workers <= self.nodes * self.stages, "workers", self.workers, "at most nodes x stages")

    def _check_schedule(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, "one of " + ", ".join(filter(None, DTYPES)))
        is_device = re.fullmatch(r"cpu|auto|cuda(:\d+)?|emulated:.+", self.device) is not None
        _require(
            is_device, "device", self.device, "cpu, cuda, cuda:N or auto, or emulated: and a profile's file"
        )
        _require(
            not (self.microbatches and self.microbatch_tokens),
            "microbatch_tokens",
            self.microbatch_tokens,
            "0 where the number of microbatches is given",
        )
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, "one of " + ", ".join(SCHEDULES))
        if self.schedule == "a-pp":
            _require(not self.microbatch_tokens, "microbatch_tokens", self.microbatch_tokens, "0 with a-pp")
            microbatches = min(self.step_examples, self.microbatches or self.step_examples)
            _require(
                microbatches >= self.stages * self.nodes,
                "microbatches" if self.microbatches else "step_examples",
                microbatches,
                f"at least stages x nodes ({self.stages * self.nodes}) with a-pp, or it would wait for its weights",
            )
        if self.schedule == "interleaved":
            _require(
                self.num_workers % self.nodes == 0
                and self.stages % (each := self.num_workers // self.nodes) == 0
                and self.stages > each,
                "workers",
                self.workers,
                "so many that each has two or more stages of one node, the same number on all, with interleaved",
            )

    @property
    def num_workers(self) -> int:
        """Worker processes to start."""
        return self.workers or self.nodes * self.stages

    @property
    def emulated_profile(self) -> str:
        """The file of the profile that workers act as if they had such accelerators by; '' where they compute."""
        return self.device.removeprefix(EMULATED) if self.device.startswith(EMULATED) else ""

    @property
    def overlaps_steps(self) -> bool:
        """A step begins before the one before is committed, on weights one version older."""
        return self.schedule == "a-pp"

    @property
    def training_nodes(self) -> tuple[int, ...]:
        """The nodes that train: all, but with `separate` the last ones, as many as its share rounds to (at least one).

        The split and its rounding to even are the paper prototype's (the first nodes serve).
        """
        if self.policy != "separate":
            return tuple(range(self.nodes))
        training = max(1, round(self.nodes * self.training_share))
        return tuple(range(max(1, self.nodes - training), self.nodes))

    @property
    def serving_nodes(self) -> tuple[int, ...]:
        """The nodes that serve: all, but with `separate` those that don't train."""
        if self.policy != "separate":
            return tuple(range(self.nodes))
        return tuple(node for node in range(self.nodes) if node not in self.training_nodes)

    def to_fields(self) -> dict[str, str]:
        """As the readable fields of a Redis hash."""
        return {name: str(value) for name, value in asdict(self).items()}


def _plugged_in() -> frozenset[str]:
    """Policies that other packages bring."""
    return frozenset(entry.name for entry in entry_points(group=POLICY_PLUGINS))


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise SettingsError(f"{name} = {value}: must be {wanted}")


def settings_from(values: Mapping[str, object], *, where: str) -> dict[str, Any]:
    """Typed settings of some text or TOML values; an unknown name or an unreadable value is refused, naming it."""
    kinds = {name: type(default) for name, default in asdict(ClusterSettings()).items()}
    typed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise SettingsError(f"{where}: unknown setting {name!r} (known: {', '.join(sorted(kinds))})")
        try:
            typed[name] = _flag(value) if kinds[name] is bool else kinds[name](value)
        except (TypeError, ValueError):
            raise SettingsError(f"{where}: {name} = {value!r} is not {_A[kinds[name]]}") from None
    return typed


def _flag(value: object) -> bool:
    """A switch as text: str(True) comes back from Redis."""
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise ValueError(value) from None


_A = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_NOT_SETTINGS = {
    *("LEMIX_URL", "LEMIX_CLUSTER", "LEMIX_DATA_DIR", "LEMIX_LOG_LEVEL"),
    *("LEMIX_METRICS_HOST", "LEMIX_METRICS_PORT"),
}


def load_settings(
    config: Path | None, environment: Mapping[str, str] | None = None, **overrides: object
) -> ClusterSettings:
    """Read file, then environment, then ``overrides`` (those not None); one `SettingsError` names what is wrong."""
    values: dict[str, Any] = {}
    if config is not None:
        try:
            values |= settings_from(tomllib.loads(config.read_text("utf-8")), where=str(config))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{config}: can't be read as TOML: {error}") from None
    environment = os.environ if environment is None else environment
    named = {
        name.removeprefix("LEMIX_").lower(): value
        for name, value in environment.items()
        if name.startswith("LEMIX_") and name not in _NOT_SETTINGS
    }
    values |= settings_from(named, where="environment")
    values |= settings_from({k: v for k, v in overrides.items() if v is not None}, where="command line")
    return ClusterSettings(**values)
