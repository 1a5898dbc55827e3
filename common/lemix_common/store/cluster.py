"""The cluster itself: who leads, which workers there are, which of them hosts which stage."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix_common.broker import LEADER_ONLY, NOTICE, Broker, Lua
from lemix_common.costs import Profile
from lemix_common.errors import ClusterError, Fenced
from lemix_common.ids import BASE_VERSION, Version
from lemix_common.profile_file import parse_profile, profile_object
from lemix_common.settings import ClusterSettings, settings_from
from lemix_common.store.items import COORDINATORS, STAGE_0, Call, fence

MAIN_RUN = "main"
"""The run that trains the model itself."""
METRICS_EXPIRY_S = 30
"""A process that hasn't announced its metrics for this long is gone."""

_CREATE = Lua(
    "create_cluster",
    """
local settings, model, run, secret, now = cjson.decode(ARGV[1]), cjson.decode(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local function differs(key, wanted)
  local fields = 0
  for name, value in pairs(wanted) do
    fields = fields + 1
    if redis.call('HGET', key, name) ~= value then return true end
  end
  return redis.call('HLEN', key) ~= fields
end
if redis.call('EXISTS', K.settings) == 1 and (differs(K.settings, settings) or differs(K.model, model)) then
  for _, worker in ipairs(redis.call('SMEMBERS', K.workers)) do
    redis.call('DEL', K.worker(worker), K.alive(worker))
  end
  redis.call('DEL', K.workers, K.leader)
  redis.call('INCR', K.leader_epoch)
  redis.call('HINCRBY', K.cluster_state, 'generation', 1)
end
local schedule = redis.call('HGET', K.settings, 'schedule')
if schedule and (schedule == 'a-pp') ~= (settings.schedule == 'a-pp') then
  -- from here on steps are late, or no longer late: the first one has no weights that are older than the last
  redis.call('HSET', K.run(run), 'base', redis.call('HGET', K.run(run), 'committed'))
end
local device = redis.call('HGET', K.settings, 'device')
if device and device ~= settings.device and device:sub(1, 9) == 'emulated:' then
  redis.call('DEL', K.profile) -- it was that of accelerators that aren't there
end
redis.call('DEL', K.settings, K.model)
for name, value in pairs(settings) do redis.call('HSET', K.settings, name, value) end
for name, value in pairs(model) do redis.call('HSET', K.model, name, value) end
redis.call('SET', K.tokenizer, ARGV[6])
if ARGV[8] == '[]' then redis.call('DEL', K.held_out) else redis.call('SET', K.held_out, ARGV[8]) end
redis.call('HSETNX', K.cluster_state, 'secret', secret)
redis.call('HSETNX', K.cluster_state, 'generation', 1)
redis.call('HSET', K.cluster_state, 'state', 'running', 'started_at', now, 'nodes', settings.nodes, 'stages', settings.stages)
redis.call('HDEL', K.cluster_state, 'reason')
redis.call('HSETNX', K.run(run), 'planned', 0)
redis.call('HSETNX', K.run(run), 'committed', 0)
redis.call('HSETNX', K.run(run), 'checkpoint', 0)
redis.call('HSETNX', K.run(run), 'lineage', 0)
redis.call('HSETNX', K.versions, 'served', ARGV[7])
redis.call('HSETNX', K.version(ARGV[7]), 'directory', '')
redis.call('HSETNX', K.checkpoints(run), ARGV[7], '')
redis.call('HDEL', K.run(run), 'refused')
return {'ok'}
""",
)

_LEAD = Lua(
    "lead",
    """
local me, expiry_ms = ARGV[1], ARGV[2]
local leader = redis.call('GET', K.leader)
if leader == me then
  redis.call('PEXPIRE', K.leader, expiry_ms)
  return {'leading', redis.call('GET', K.leader_epoch)}
elseif leader then
  return {'following', leader}
end
redis.call('SET', K.leader, me, 'PX', expiry_ms)
return {'leading', redis.call('INCR', K.leader_epoch)}
""",
)

_RESIGN = Lua("resign", "if redis.call('GET', K.leader) == ARGV[1] then redis.call('DEL', K.leader) end")

_REGISTER = Lua(
    "register_worker",
    NOTICE
    + """
local worker, fields, expiry_ms = ARGV[1], cjson.decode(ARGV[2]), ARGV[3]
if fields.generation and fields.generation ~= redis.call('HGET', K.cluster_state, 'generation') then return {'fenced'} end
for _, other in ipairs(redis.call('SMEMBERS', K.workers)) do
  if other ~= worker and redis.call('HGET', K.worker(other), 'slot') == fields.slot then
    redis.call('DEL', K.alive(other))
  end
end
for name, value in pairs(fields) do redis.call('HSET', K.worker(worker), name, value) end
redis.call('SADD', K.workers, worker)
redis.call('SET', K.alive(worker), '0', 'PX', expiry_ms)
notice('WorkerRegistered', 'worker', worker)
return {'ok'}
""",
)

_BEAT = Lua(
    "beat",
    """
if redis.call('SISMEMBER', K.workers, ARGV[1]) == 0 then return {'unknown'} end
redis.call('SET', K.alive(ARGV[1]), ARGV[2], 'PX', ARGV[3])
redis.call('HSET', K.worker(ARGV[1]), 'memory_used', ARGV[4], 'links', ARGV[5])
return {'ok'}
""",
)

_FORGET_WORKER = Lua(
    "forget_worker",
    LEADER_ONLY
    + "redis.call('SREM', K.workers, ARGV[2])\nredis.call('DEL', K.worker(ARGV[2]), K.alive(ARGV[2]))\nreturn {'ok'}",
)

_PLACE = Lua(
    "place_node",
    LEADER_ONLY
    + NOTICE
    + """
local node = ARGV[2]
local epoch = redis.call('INCR', K.placement_epoch)
for s = 3, #ARGV do
  local stage, worker = s - 3, ARGV[s]
  if redis.call('HGET', K.node(node), 'stage:' .. stage) ~= worker then
    redis.call('HDEL', K.node(node), 'training:' .. stage)
  end
  redis.call('HSET', K.node(node), 'stage:' .. stage, worker)
  redis.call('HDEL', K.node(node), 'ready:' .. stage, 'version:' .. stage)
end
redis.call('HSET', K.node(node), 'epoch', epoch)
notice('PlacementChanged', 'node', node, 'epoch', epoch)
return {'ok', epoch}
""",
)

_STEP_OF = """
local function step_of(run, version)
  local lineage, step = string.match(version, '^(%d+)%.(%d+)$')
  return lineage and lineage == redis.call('HGET', K.run(run), 'lineage') and step
end
"""
"""Lua: the step of a training state, unless it is of a lineage that a rollback has left."""

_STAGE_READY = Lua(
    "stage_ready",
    NOTICE
    + _STEP_OF
    + """
local worker, node, stage, epoch, run, training, loaded, layers, memory = unpack(ARGV)
local at = redis.call('HMGET', K.node(node), 'epoch', 'stage:' .. stage)
if at[1] ~= epoch or at[2] ~= worker then return {'stale'} end
local have, missing = {}, {}
for _, version in ipairs(cjson.decode(loaded)) do have[version] = true end
local live = redis.call('HMGET', K.versions, 'served', 'draining', 'preparing')
for i = 1, 3 do
  if live[i] and live[i] ~= '' and not have[live[i]] then missing[#missing + 1] = live[i] end
end
if #missing > 0 then return {'missing', unpack(missing)} end
for version in pairs(have) do
  if version == live[3] then redis.call('HSET', K.version(version), 'prepared:' .. node .. ':' .. stage, epoch) end
end
redis.call('HSET', K.node(node), 'ready:' .. stage, epoch, 'layers:' .. stage, layers, 'memory:' .. stage, memory,
           'version:' .. stage, live[1] or '')
local step = step_of(run, training)
if step then
  redis.call('HSET', K.node(node), 'training:' .. stage, step)
else
  redis.call('HDEL', K.node(node), 'training:' .. stage)
end
notice('StageReady', 'node', node, 'stage', stage, 'epoch', epoch)
local retired = {}
for version in pairs(have) do
  if version ~= live[1] and version ~= live[2] and version ~= live[3] then retired[#retired + 1] = version end
end
return {'ok', unpack(retired)}
""",
)

_TRAINING_AT = Lua(
    "training_at",
    NOTICE
    + _STEP_OF
    + """
local worker, node, stage, epoch, run, training = unpack(ARGV)
local at, step = redis.call('HMGET', K.node(node), 'epoch', 'stage:' .. stage), step_of(run, training)
if at[1] ~= epoch or at[2] ~= worker or not step then return {'stale'} end
redis.call('HSET', K.node(node), 'training:' .. stage, step)
notice('StageReady', 'node', node, 'stage', stage, 'epoch', epoch)
return {'ok'}
""",
)

_LINK_LOST = Lua(
    "link_lost",
    NOTICE
    + """
if redis.call('HGET', K.node(ARGV[1]), 'epoch') ~= ARGV[2] then return {'stale'} end
redis.call('HSET', K.node(ARGV[1]), 'link_lost', ARGV[2])
notice('LinkLost', 'node', ARGV[1], 'epoch', ARGV[2], 'peer', ARGV[3])
return {'ok'}
""",
)

_STAGE_FAILED = Lua(
    "stage_failed",
    NOTICE
    + """
redis.call('HSET', K.cluster_state, 'reason', ARGV[4])
notice('StageFailed', 'node', ARGV[1], 'stage', ARGV[2], 'epoch', ARGV[3], 'reason', ARGV[4])
return {'ok'}
""",
)


_PUBLISH_PROFILE = Lua(
    "publish_profile",
    """
redis.call('HINCRBY', K.profile, 'version', 1)
for name, value in pairs(cjson.decode(ARGV[1])) do redis.call('HSET', K.profile, name, value) end
return {'ok'}
""",
)

_ANNOUNCE_METRICS = Lua(
    "announce_metrics",
    """
local member, now, expiry_s = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', K.metrics, '-inf', now - expiry_s)
redis.call('ZADD', K.metrics, ARGV[2], member)
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Calls about the cluster, its leader, workers and placement."""

    broker: Broker

    # ---- the cluster's life
    def create(
        self,
        settings: ClusterSettings,
        model: Mapping[str, object],
        tokenizer: str,
        held_out: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    ) -> None:
        """Publish settings and model and open for work; what an earlier life left (items, steps) stays.

        Repeating it changes nothing. Where settings or model differ from what was published, a new generation begins:
        nobody leads and no worker is known, and who runs on the old ones isn't taken up again.
        """
        self.broker.ensure_group(self.broker.keys.submissions, COORDINATORS)
        for node in range(settings.nodes):
            self.broker.ensure_group(self.broker.keys.work(node), STAGE_0)
        now = f"{self.broker.clock.now():.6f}"
        about = {name: str(value) for name, value in model.items()}
        secret = secrets.token_hex(32)
        self.broker.call(
            _CREATE,
            settings.to_fields(),
            about,
            MAIN_RUN,
            secret,
            now,
            tokenizer,
            str(BASE_VERSION),
            list(held_out),
        )

    def settings(self) -> ClusterSettings:
        """The settings in force; `ClusterError` if there is no cluster."""
        fields = self.broker.hash(self.broker.keys.settings)
        if not fields:
            raise ClusterError(
                f"no cluster {self.broker.keys.cluster!r} on this broker: start one with `lemix up`"
            )
        return ClusterSettings(**settings_from(fields, where="the cluster's settings"))

    def profile(self) -> Profile | None:
        """What work costs on the cluster's accelerators, if that was measured or given; `BadInput` if it's damaged."""
        text = self.broker.hash(self.broker.keys.profile).get("profile")
        return parse_profile(text, where=f"what {self.broker.keys.profile} holds") if text else None

    def publish_profile(self, profile: Profile) -> None:
        """What work costs from now on; who is told so goes by it from its next start."""
        about = {
            "model": profile.model,
            "device": profile.device,
            "source": profile.source,
            "stages": str(profile.num_stages),
            "published_at": f"{self.broker.clock.now():.6f}",
            "profile": json.dumps(profile_object(profile), separators=(",", ":")),
        }
        self.broker.call(_PUBLISH_PROFILE, about)

    def tokenizer(self) -> str:
        """The text of the model's tokenizer.json; '' if it has none."""
        text: Any = self.broker.again(lambda: self.broker.client.get(self.broker.keys.tokenizer))
        return str(text or "")

    def state(self) -> dict[str, str]:
        """The cluster's own fields."""
        return self.broker.hash(self.broker.keys.cluster_state)

    def secret(self) -> bytes:
        """What workers prove to each other that they belong here."""
        return bytes.fromhex(self.state()["secret"])

    def stop_accepting(self) -> None:
        """Refuse new items and start no new training step."""
        self.broker.again(
            lambda: self.broker.client.hset(self.broker.keys.cluster_state, "state", "stopping")
        )

    # ---- leadership
    def lead(self, coordinator: str, *, expiry_s: float) -> int | None:
        """Take or keep the lead: the leader's epoch, or None while another leads."""
        answer = self.broker.call(_LEAD, coordinator, int(1000 * expiry_s))
        return int(answer[1]) if answer[0] == "leading" else None

    def resign(self, coordinator: str) -> None:
        """Give the lead back at once."""
        self.broker.call(_RESIGN, coordinator)

    # ---- workers
    def register(self, worker: str, fields: Mapping[str, object], *, expiry_s: float) -> None:
        """A worker process is there; an earlier process of the same slot is dead.

        `Fenced` if its ``generation`` (see `state`) is over: it must start afresh to read the settings in force.
        """
        texts = {name: str(value) for name, value in fields.items()}
        if self.broker.call(_REGISTER, worker, texts, int(1000 * expiry_s))[0] == "fenced":
            raise Fenced("the cluster has other settings by now")

    def beat(
        self, worker: str, progress: int, *, expiry_s: float, memory_used_bytes: int = 0, links: str = ""
    ) -> bool:
        """The worker lives and its compute loop is at ``progress``; False if it was given up meanwhile."""
        answer = self.broker.call(_BEAT, worker, progress, int(1000 * expiry_s), memory_used_bytes, links)
        return bool(answer[0] == "ok")

    def forget_worker(self, leader_epoch: int, worker: str) -> None:
        """Strike a dead worker off the register."""
        fence(self.broker.call(_FORGET_WORKER, leader_epoch, worker))

    def workers(self) -> dict[str, dict[str, str]]:
        """Registered workers with their fields, and ``alive`` where the heartbeat hasn't expired."""
        keys = self.broker.keys
        members: Any = self.broker.again(lambda: self.broker.client.smembers(keys.workers))
        names = sorted(members)
        if not names:
            return {}
        fields = self.broker.hashes(keys.worker(name) for name in names)
        beats: Any = self.broker.again(lambda: self.broker.client.mget([keys.alive(name) for name in names]))
        return {
            name: known | ({"alive": beat} if beat is not None else {})
            for name, known, beat in zip(names, fields, beats, strict=True)
        }

    # ---- metrics
    def announce_metrics(self, process: str, url: str) -> None:
        """A process shows its metrics there; it says so again before `METRICS_EXPIRY_S` have passed."""
        now = f"{self.broker.clock.now():.3f}"
        self.broker.call(_ANNOUNCE_METRICS, f"{process} {url}", now, METRICS_EXPIRY_S)

    def withdraw_metrics(self, process: str, url: str) -> None:
        """The process ends."""
        self.broker.again(lambda: self.broker.client.zrem(self.broker.keys.metrics, f"{process} {url}"))

    def metrics(self) -> dict[str, str]:
        """Where each process that lives shows its metrics."""
        oldest = self.broker.clock.now() - METRICS_EXPIRY_S
        members: Any = self.broker.again(
            lambda: self.broker.client.zrangebyscore(self.broker.keys.metrics, oldest, "+inf")
        )
        return dict(sorted(member.split(" ", 1) for member in members))

    # ---- placement
    def nodes(self, nodes: int) -> list[dict[str, str]]:
        """The nodes' hashes."""
        return self.broker.hashes(self.broker.keys.node(node) for node in range(nodes))

    def place(self, leader_epoch: int, node: int, workers: Sequence[str]) -> None:
        """Have ``workers[s]`` host stage s ('' for nobody yet); the node starts afresh in a new epoch."""
        fence(self.broker.call(_PLACE, leader_epoch, node, *workers))

    def stage_ready(
        self,
        worker: str,
        *,
        node: int,
        stage: int,
        epoch: int,
        training: Version | None,
        versions: Sequence[str],
        layers: Sequence[int],
        memory_bytes: int,
    ) -> tuple[list[str], list[str]]:
        """Report a stage that holds these versions: returns those it must load first, and those nobody needs any more."""
        known = "" if training is None else str(training)
        about = (worker, node, stage, epoch, MAIN_RUN, known, list(versions), list(layers), memory_bytes)
        match self.broker.call(_STAGE_READY, *about):
            case ["missing", *missing]:
                return missing, []
            case [_, *retired]:
                return [], retired
            case _:
                return [], []

    def training_at(self, worker: str, *, node: int, stage: int, epoch: int, training: Version) -> Call:
        """The call that reports where a stage's training state is."""
        return _TRAINING_AT, (worker, node, stage, epoch, MAIN_RUN, str(training))

    def link_lost(self, node: int, epoch: int, peer: str) -> None:
        """Report that messages of this node may be lost, so that it starts afresh."""
        self.broker.call(_LINK_LOST, node, epoch, peer)

    def stage_failed(self, node: int, stage: int, epoch: int, reason: str) -> None:
        """Report that a stage can't work here at all."""
        self.broker.call(_STAGE_FAILED, node, stage, epoch, reason)
