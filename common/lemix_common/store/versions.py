"""Weight versions and the operations that make them: snapshots written by the stages, sealed, published.

An operation is a record that moves through the table below; each move is one compare-and-set, made by a Celery task of
at most 20 s. What a move waits for comes from the workers (``shard:S`` written, ``prepared:N:S`` loaded).

::

    checkpoint:   requested ─▶ writing ─▶ sealed                         (any ─▶ failed)
    fingerprint:  requested ─▶ writing ─▶ sealed
    publish:      requested ─▶ writing ─▶ preparing ─▶ judging ─▶ published
    rollback:     requested ────────────▶ preparing ─────────────▶ published
                                              └───────────┴─────▶ withdrawn ─▶ held_back | failed

A snapshot that loses a writer goes back to *requested* with other writers. Only a gate makes *judging* (`store/gate.py`).
A version that the gate holds back, or that a stage can't load, is *withdrawn*: the stages forget it, its files go, and
what was served stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix_common.broker import LEADER_ONLY, NOTICE, Broker, Lua
from lemix_common.store.items import REPLY, fence
from lemix_common.store.rollbacks import BEGIN_LINEAGE, WITHDRAWAL

ENDED_STATES = frozenset({"sealed", "published", "held_back", "failed"})

_END = """
local function end_operation(id, state)
  redis.call('HSET', K.operation(id), 'state', state)
  redis.call('SREM', K.operations, id)
  redis.call('EXPIRE', K.operation(id), 3600)
end
"""
"""Lua: an operation has come to its end; its record stays for a while."""

_OPEN = Lua(
    "open_operation",
    NOTICE
    + """
local leader_epoch, id, fields = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
if leader_epoch ~= '' and redis.call('GET', K.leader_epoch) ~= leader_epoch then return {'fenced'} end
if redis.call('EXISTS', K.operation(id)) == 1 then return {'exists'} end
for name, value in pairs(fields) do redis.call('HSET', K.operation(id), name, value) end
redis.call('HSET', K.operation(id), 'state', 'requested')
redis.call('SADD', K.operations, id)
notice('OperationAdvanced', 'operation', id, 'state', 'requested')
return {'ok'}
""",
)

_ADVANCE = Lua(
    "advance_operation",
    NOTICE
    + _END
    + """
local id, from, to, ended, fields = ARGV[1], ARGV[2], ARGV[3], ARGV[4], cjson.decode(ARGV[5])
if redis.call('HGET', K.operation(id), 'state') ~= from then return {'stale'} end
for name, value in pairs(fields) do redis.call('HSET', K.operation(id), name, value) end
if ended == '1' then end_operation(id, to) else redis.call('HSET', K.operation(id), 'state', to) end
notice('OperationAdvanced', 'operation', id, 'state', to)
return {'ok'}
""",
)

_WRITE = Lua(
    "write_shards",
    NOTICE
    + """
local id = ARGV[1]
local state, run, writers, optimizer, root = unpack(
  redis.call('HMGET', K.operation(id), 'state', 'run', 'writers', 'optimizer', 'root'))
if state ~= 'requested' then return {'stale'} end
local step, lineage = unpack(redis.call('HMGET', K.run(run), 'committed', 'lineage'))
local directory = root .. '/.writing-' .. id .. '-' .. redis.call('HINCRBY', K.operation(id), 'tries', 1)
redis.call('HSET', K.operation(id), 'state', 'writing', 'step', step, 'lineage', lineage, 'directory', directory,
           'version', lineage .. '.' .. step)
notice('WriteShards', 'operation', id, 'run', run, 'step', step, 'lineage', lineage, 'optimizer', optimizer,
       'writers', writers, 'directory', directory)
return {'ok'}
""",
)

_CHOOSE_WRITERS = Lua(
    "choose_writers",
    LEADER_ONLY
    + NOTICE
    + """
local id, before, writers, epochs = unpack(ARGV, 2, 5)
if redis.call('HGET', K.operation(id), 'state') ~= before then return {'stale'} end
for s = 0, tonumber(redis.call('HGET', K.cluster_state, 'stages')) - 1 do
  redis.call('HDEL', K.operation(id), 'shard:' .. s)
end
redis.call('HSET', K.operation(id), 'state', 'requested', 'writers', writers, 'epochs', epochs)
notice('OperationAdvanced', 'operation', id, 'state', 'requested')
return {'ok'}
""",
)

_SHARD_WRITTEN = Lua(
    "shard_written",
    NOTICE
    + """
local id, stage, directory, report = unpack(ARGV)
local at = redis.call('HMGET', K.operation(id), 'state', 'directory')
if at[1] ~= 'writing' or at[2] ~= directory then return {'stale'} end
redis.call('HSET', K.operation(id), 'shard:' .. stage, report)
notice('OperationAdvanced', 'operation', id, 'state', 'writing')
return {'ok'}
""",
)

_SEAL = Lua(
    "seal_snapshot",
    NOTICE
    + _END
    + """
local id, written, directory, sha256 = unpack(ARGV)
local state, kind, run, step, version, at = unpack(
  redis.call('HMGET', K.operation(id), 'state', 'kind', 'run', 'step', 'version', 'directory'))
if state ~= 'writing' or at ~= written then return {'stale'} end
redis.call('HSET', K.operation(id), 'directory', directory, 'sha256', sha256)
end_operation(id, 'sealed')
local newest = tonumber(redis.call('HGET', K.run(run), 'checkpoint') or '0')
if kind == 'checkpoint' then
  redis.call('HSET', K.checkpoints(run), version, directory)
  if tonumber(step) >= newest then
    redis.call('HSET', K.run(run), 'checkpoint', step, 'checkpoint_directory', directory, 'checkpoint_sha256', sha256)
    redis.call('HDEL', K.run(run), 'refused')
  end
end
notice('OperationAdvanced', 'operation', id, 'state', 'sealed')
return {'ok'}
""",
)

_PREPARE = Lua(
    "prepare_version",
    NOTICE
    + """
local id, written, directory, sha256, now = unpack(ARGV)
local state, version, step, at = unpack(redis.call('HMGET', K.operation(id), 'state', 'version', 'step', 'directory'))
if state ~= 'writing' or at ~= written then return {'stale'} end
local live = redis.call('HMGET', K.versions, 'preparing', 'draining')
if live[1] or live[2] then return {'waiting'} end -- no stage holds more than two served versions
redis.call('HSET', K.operation(id), 'state', 'preparing', 'directory', directory, 'sha256', sha256)
redis.call('HSET', K.version(version), 'directory', directory, 'sha256', sha256, 'step', step, 'sealed_at', now,
           'operation', id)
redis.call('HSET', K.versions, 'preparing', version)
notice('PrepareVersion', 'version', version, 'directory', directory)
return {'ok'}
""",
)

_PREPARED = Lua(
    "version_prepared",
    NOTICE
    + """
local version, node, stage, epoch = unpack(ARGV)
local live = redis.call('HMGET', K.versions, 'served', 'draining', 'preparing')
if version ~= live[1] and version ~= live[2] and version ~= live[3] then return {'retired'} end
redis.call('HSET', K.version(version), 'prepared:' .. node .. ':' .. stage, epoch)
notice('OperationAdvanced', 'operation', version, 'state', 'preparing')
return {'ok'}
""",
)

_PUBLISH = Lua(
    "publish_version",
    NOTICE
    + _END
    + REPLY
    + BEGIN_LINEAGE
    + """
local id, now = ARGV[1], ARGV[2]
local state, run, version, step, kind = unpack(
  redis.call('HMGET', K.operation(id), 'state', 'run', 'version', 'step', 'kind'))
if state ~= 'preparing' and state ~= 'judging' then return {'stale'} end
local nodes, stages = unpack(redis.call('HMGET', K.cluster_state, 'nodes', 'stages'))
local able = 0
for n = 0, nodes - 1 do
  local ready, prepared = 0, 0
  local epoch = redis.call('HGET', K.node(n), 'epoch')
  for s = 0, stages - 1 do
    if redis.call('HGET', K.node(n), 'ready:' .. s) == epoch then ready = ready + 1 end
    if redis.call('HEXISTS', K.version(version), 'prepared:' .. n .. ':' .. s) == 1 then prepared = prepared + 1 end
  end
  if ready == tonumber(stages) then
    if prepared < ready then return {'waiting'} end
    able = able + 1
  end
end
if able == 0 then return {'waiting'} end
local old = redis.call('HGET', K.versions, 'served')
if old == version then -- published by another operation: it must not become the one that is retired
  redis.call('HDEL', K.versions, 'preparing')
  end_operation(id, 'published')
  return {'ok'}
end
redis.call('HSET', K.versions, 'served', version, 'draining', old)
redis.call('HDEL', K.versions, 'preparing')
redis.call('HSET', K.version(version), 'published_at', now)
end_operation(id, 'published')
notice('VersionPublished', 'version', version)
for n = 0, nodes - 1 do
  local epoch = redis.call('HGET', K.node(n), 'epoch')
  for s = 0, stages - 1 do
    if epoch and redis.call('HGET', K.node(n), 'ready:' .. s) == epoch then
      redis.call('HSET', K.node(n), 'version:' .. s, version)
    end
  end
end
local first = tonumber(redis.call('HGET', K.run(run), 'published') or '0') + 1
local examples = 0
for k = first, tonumber(step) do
  for _, item in ipairs(cjson.decode(redis.call('HGET', K.step(run, k), 'items') or '[]')) do
    if redis.call('HGET', K.item(item), 'state') == 'committed' then
      local loss = redis.call('HGET', K.step(run, k), 'loss')
      local result = cjson.encode({step = k, run = run, step_loss = tonumber(loss)})
      redis.call('HSET', K.item(item), 'state', 'done', 'ended_at', now, 'weights_version', version, 'result', result)
      redis.call('HINCRBY', K.totals, 'done', 1)
      redis.call('HINCRBY', K.totals, 'open', -1)
      examples = examples + 1
      reply(item, 'event', 'done', 'weights_version', version, 'result', result)
    end
  end
end
redis.call('HSET', K.run(run), 'published', step)
local parent, loss = old, redis.call('HGET', K.step(run, step), 'loss') or ''
if kind == 'rollback' then
  parent, loss = redis.call('HGET', K.operation(id), 'target'), '' -- the step's loss is of other weights
  begin_lineage(id, run)
end
redis.call('XADD', K.version_log, 'MAXLEN', '~', 10000, '*', 'version', version, 'parent', parent, 'run', run,
           'step', step, 'examples', examples, 'loss', loss,
           'sha256', redis.call('HGET', K.version(version), 'sha256') or '', 'published_at', now, 'verdict', 'served',
           'held_out_loss', redis.call('HGET', K.operation(id), 'held_out_loss') or '')
return {'ok'}
""",
)

_REFUSE = Lua(
    "refuse_version",
    NOTICE
    + WITHDRAWAL
    + """
local version, reason = ARGV[1], ARGV[2]
local id = redis.call('HGET', K.version(version), 'operation')
local state = id and redis.call('HGET', K.operation(id), 'state')
if state ~= 'preparing' and state ~= 'judging' then return {'stale'} end
withdraw(id, version, reason)
return {'ok'}
""",
)

_RETIRE = Lua(
    "retire_version",
    LEADER_ONLY
    + NOTICE
    + """
local version = redis.call('HGET', K.versions, 'draining')
if not version or tonumber(redis.call('HGET', K.versions_in_flight, version) or '0') > 0 then return {'waiting'} end
redis.call('HDEL', K.versions, 'draining')
local directory = redis.call('HGET', K.version(version), 'directory')
redis.call('EXPIRE', K.version(version), 3600)
notice('VersionRetired', 'version', version)
return {'ok', version, directory or ''}
""",
)

_LOAD_TRAINING = Lua(
    "load_training",
    LEADER_ONLY
    + NOTICE
    + """
local run, step, directory, nodes, epochs, loading, seen_attempt = unpack(ARGV, 2, 8)
if (redis.call('HGET', K.run(run), 'attempt') or '0') ~= seen_attempt then return {'stale'} end
local attempt = redis.call('HINCRBY', K.run(run), 'attempt', 1)
redis.call('HSET', K.run(run), 'concluded', attempt, 'loading', loading)
local stages = tonumber(redis.call('HGET', K.cluster_state, 'stages'))
for _, n in ipairs(cjson.decode(nodes)) do
  for s = 0, stages - 1 do redis.call('HDEL', K.node(n), 'training:' .. s) end
end
notice('LoadTraining', 'run', run, 'step', step, 'lineage', redis.call('HGET', K.run(run), 'lineage'),
       'directory', directory, 'nodes', nodes, 'epochs', epochs)
return {'ok'}
""",
)

_REFUSE_TRAINING = Lua(
    "refuse_training",
    NOTICE
    + """
local run, directory, reason = unpack(ARGV)
if redis.call('HGET', K.run(run), 'checkpoint_directory') ~= directory then return {'stale'} end
redis.call('HSET', K.run(run), 'refused', reason, 'loading', '[]')
notice('TrainingRefused', 'run', run, 'directory', directory, 'reason', reason)
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True)
class Versions:
    """Calls about versions and operations."""

    broker: Broker

    # ---- operations
    def open(
        self,
        operation: str,
        kind: str,
        *,
        run: str,
        root: str,
        optimizer: bool = False,
        writers: Sequence[int] = (),
        epochs: Sequence[int] = (),
        leader_epoch: int | None = None,
    ) -> None:
        """Record a wanted snapshot under ``root``; stage s is written by node ``writers[s]`` (none: any that can).

        A coordinator says in which epoch it leads, and gets `Fenced` if it doesn't any more; a client says nothing.
        """
        fields = {
            "kind": kind,
            "run": run,
            "writers": list(writers),
            "epochs": list(epochs),
            "optimizer": int(optimizer),
            "root": root,
            "opened_at": f"{self.broker.clock.now():.6f}",
        }
        texts = {name: str(value) for name, value in fields.items()}
        fence(self.broker.call(_OPEN, "" if leader_epoch is None else leader_epoch, operation, texts))

    def operation(self, operation: str) -> dict[str, str]:
        """An operation's fields."""
        return self.broker.hash(self.broker.keys.operation(operation))

    def in_progress(self) -> dict[str, dict[str, str]]:
        """Operations that haven't ended."""
        ids: Any = self.broker.again(lambda: self.broker.client.smembers(self.broker.keys.operations))
        names = sorted(ids)
        return dict(
            zip(names, self.broker.hashes(self.broker.keys.operation(name) for name in names), strict=True)
        )

    def advance(
        self, operation: str, before: str, after: str, fields: Mapping[str, object] | None = None
    ) -> bool:
        """Move an operation on; False if it was elsewhere."""
        texts = {name: str(value) for name, value in (fields or {}).items()}
        ended = int(after in ENDED_STATES)
        return bool(self.broker.call(_ADVANCE, operation, before, after, ended, texts)[0] == "ok")

    def write_shards(self, operation: str) -> None:
        """requested ─▶ writing: the state after the step committed last, in the control stream's order."""
        self.broker.call(_WRITE, operation)

    def shard_written(self, operation: str, stage: int, directory: str, report: Mapping[str, object]) -> None:
        """A stage's files are durable in the operation's directory."""
        self.broker.call(_SHARD_WRITTEN, operation, stage, directory, dict(report))

    def choose_writers(
        self, leader_epoch: int, operation: str, before: str, writers: Sequence[int], epochs: Sequence[int]
    ) -> None:
        """(Re)start a snapshot with these nodes as its stages' writers; what others wrote is forgotten."""
        fence(self.broker.call(_CHOOSE_WRITERS, leader_epoch, operation, before, list(writers), list(epochs)))

    def seal(self, operation: str, directory: str, sha256: str, *, written: str) -> None:
        """writing ─▶ sealed: a fingerprint, or the run's newest checkpoint, of what was ``written`` there."""
        self.broker.call(_SEAL, operation, written, directory, sha256)

    def prepare(self, operation: str, directory: str, sha256: str, *, written: str) -> None:
        """writing ─▶ preparing: every serving stage loads the sealed version."""
        self.broker.call(_PREPARE, operation, written, directory, sha256, f"{self.broker.clock.now():.6f}")

    def prepared(self, version: str, *, node: int, stage: int, epoch: int) -> bool:
        """A stage has the version loaded; False if nobody wants it any more."""
        return bool(self.broker.call(_PREPARED, version, node, stage, epoch)[0] == "ok")

    def refuse(self, version: str, reason: str) -> None:
        """preparing ─▶ withdrawn: a stage can't load the version."""
        self.broker.call(_REFUSE, version, reason)

    def publish(self, operation: str) -> str:
        """preparing or judging ─▶ published, if every ready node has it: one flip; its examples are done."""
        return str(self.broker.call(_PUBLISH, operation, f"{self.broker.clock.now():.6f}")[0])

    # ---- versions
    def live(self) -> dict[str, str]:
        """``served`` and, where there are such, ``draining`` and ``preparing``."""
        return self.broker.hash(self.broker.keys.versions)

    def published(self, count: int) -> list[dict[str, str]]:
        """The versions published last, newest first: version, parent, run, step, examples, loss, sha256, published_at."""
        log: Any = self.broker.again(
            lambda: self.broker.client.xrevrange(self.broker.keys.version_log, count=count)
        )
        return [dict(fields) for _, fields in log]

    def version(self, version: str) -> dict[str, str]:
        """A version's fields."""
        return self.broker.hash(self.broker.keys.version(version))

    def retire(self, leader_epoch: int) -> tuple[str, str] | None:
        """Retire the draining version if no item uses it: the version and its directory."""
        answer = self.broker.call(_RETIRE, leader_epoch)
        return (str(answer[1]), str(answer[2])) if fence(answer) == "ok" else None

    def load_training(
        self,
        leader_epoch: int,
        *,
        run: str,
        step: int,
        directory: str,
        nodes: Sequence[int],
        epochs: Sequence[int],
        seen_attempt: int,
    ) -> None:
        """Have these nodes take their training state from a checkpoint ('' for the model folder, step 0)."""
        fence(
            self.broker.call(
                _LOAD_TRAINING,
                leader_epoch,
                run,
                step,
                directory,
                list(nodes),
                list(epochs),
                list(zip(nodes, epochs, strict=True)),
                seen_attempt,
            )
        )

    def refuse_training(self, run: str, directory: str, reason: str) -> bool:
        """A stage can't take its training state from this directory: False if that isn't the run's checkpoint any more."""
        return bool(self.broker.call(_REFUSE_TRAINING, run, directory, reason)[0] == "ok")
