"""Going back: an earlier checkpoint's weights become those that are served and trained, as a new lineage.

Nothing is changed before every serving stage has loaded the checkpoint. Then one call flips both: requests that begin
are served by the new version ``LINEAGE.STEP``, and training goes on from the checkpoint's state, optimizer included. Its
step is the step committed last: steps are numbered as they were committed, and none is computed twice. What was planned
and not committed goes on upon the weights that were gone back to.

From the beginning of a rollback to its end nothing is committed, so that the step in the version's name stays the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from lemix_common.broker import NOTICE, Broker, Lua
from lemix_common.errors import BadInput
from lemix_common.ids import Version

BEGIN_LINEAGE = """
local function begin_lineage(id, run)
  local lineage, step, directory, sha256 = unpack(
    redis.call('HMGET', K.operation(id), 'lineage', 'step', 'directory', 'sha256'))
  redis.call('HSET', K.run(run), 'lineage', lineage, 'base', step, 'checkpoint', step, 'checkpoint_directory', directory,
             'checkpoint_sha256', sha256, 'loading', '[]')
  redis.call('HDEL', K.run(run), 'rolling_back', 'refused')
  local nodes, stages = unpack(redis.call('HMGET', K.cluster_state, 'nodes', 'stages'))
  for n = 0, nodes - 1 do
    for s = 0, stages - 1 do redis.call('HDEL', K.node(n), 'training:' .. s) end
  end
  for _, other in ipairs(redis.call('SMEMBERS', K.operations)) do
    local state, of = unpack(redis.call('HMGET', K.operation(other), 'state', 'run'))
    if of == run and state == 'writing' then -- of the lineage that was left: it is written again, of this one
      for s = 0, stages - 1 do redis.call('HDEL', K.operation(other), 'shard:' .. s) end
      redis.call('HSET', K.operation(other), 'state', 'requested', 'writers', '[]', 'epochs', '[]')
    end
  end
end
"""
"""Lua: make the version of a rollback the state that training goes on from. Part of the call that serves it."""

WITHDRAWAL = """
local function withdraw(id, version, reason)
  redis.call('HSET', K.operation(id), 'state', 'withdrawn', 'reason', reason)
  redis.call('HDEL', K.versions, 'preparing')
  redis.call('DEL', K.version(version))
  local run = redis.call('HGET', K.operation(id), 'run')
  if redis.call('HGET', K.run(run), 'rolling_back') == id then redis.call('HDEL', K.run(run), 'rolling_back') end
  notice('VersionRetired', 'version', version)
  notice('OperationAdvanced', 'operation', id, 'state', 'withdrawn')
end
"""
"""Lua: have every stage forget a version that is being prepared."""

_OPEN = Lua(
    "open_rollback",
    NOTICE
    + """
local id, run, target, now = unpack(ARGV)
if redis.call('EXISTS', K.operation(id)) == 1 then return {'exists'} end
if redis.call('HGET', K.cluster_state, 'state') ~= 'running' then return {'stopping'} end
for _, other in ipairs(redis.call('SMEMBERS', K.operations)) do
  if redis.call('HGET', K.operation(other), 'kind') == 'rollback' then return {'busy', other} end
end
local directory = redis.call('HGET', K.checkpoints(run), target)
if not directory then return {'unknown', unpack(redis.call('HKEYS', K.checkpoints(run)))} end
redis.call('HSET', K.operation(id), 'kind', 'rollback', 'state', 'requested', 'run', run, 'target', target,
           'directory', directory, 'opened_at', now)
redis.call('SADD', K.operations, id)
notice('OperationAdvanced', 'operation', id, 'state', 'requested')
return {'ok'}
""",
)

_BEGIN = Lua(
    "begin_rollback",
    NOTICE
    + """
local id, sha256, now = unpack(ARGV)
local state, run, directory = unpack(redis.call('HMGET', K.operation(id), 'state', 'run', 'directory'))
if state ~= 'requested' then return {'stale'} end
local live = redis.call('HMGET', K.versions, 'preparing', 'draining')
if live[1] or live[2] then return {'waiting'} end -- no stage holds more than two served versions and one to come
local step, lineage, newest = unpack(redis.call('HMGET', K.run(run), 'committed', 'lineage', 'newest_lineage'))
lineage = math.max(tonumber(lineage), tonumber(newest or '0')) + 1 -- also where one before this one was withdrawn
local version = lineage .. '.' .. step
local attempt = redis.call('HINCRBY', K.run(run), 'attempt', 1) -- what is being computed is dropped
redis.call('HSET', K.run(run), 'concluded', attempt, 'newest_lineage', lineage, 'rolling_back', id)
redis.call('HSET', K.operation(id), 'state', 'preparing', 'step', step, 'lineage', lineage, 'version', version,
           'sha256', sha256)
redis.call('HSET', K.version(version), 'directory', directory, 'sha256', sha256, 'step', step, 'sealed_at', now,
           'operation', id)
redis.call('HSET', K.versions, 'preparing', version)
notice('PrepareVersion', 'version', version, 'directory', directory)
notice('OperationAdvanced', 'operation', id, 'state', 'preparing')
return {'ok'}
""",
)

_FORGET_CHECKPOINT = Lua(
    "forget_checkpoint",
    """
local run, version = ARGV[1], ARGV[2]
local directory = redis.call('HGET', K.checkpoints(run), version)
if not directory or redis.call('HGET', K.run(run), 'checkpoint_directory') == directory then return {'needed'} end
for _, live in ipairs(redis.call('HVALS', K.versions)) do
  if redis.call('HGET', K.version(live), 'directory') == directory then return {'needed'} end
end
for _, operation in ipairs(redis.call('SMEMBERS', K.operations)) do
  if redis.call('HGET', K.operation(operation), 'directory') == directory then return {'needed'} end
end
redis.call('HDEL', K.checkpoints(run), version)
return {'ok', directory}
""",
)


@dataclass(frozen=True, slots=True)
class Rollbacks:
    """Calls about the checkpoints of a run and going back to them."""

    broker: Broker
    run: str

    def checkpoints(self) -> dict[Version, str]:
        """The versions that can be gone back to, oldest first, and the directories they are in ('': the model's own)."""
        known = self.broker.hash(self.broker.keys.checkpoints(self.run))
        return dict(sorted((Version.parse(version), directory) for version, directory in known.items()))

    def open(self, operation: str, target: Version) -> None:
        """Ask for a rollback; `BadInput` if there is no such checkpoint or another rollback is on its way."""
        match self.broker.call(_OPEN, operation, self.run, str(target), f"{self.broker.clock.now():.6f}"):
            case ["ok" | "exists"]:
                return
            case ["busy", other]:
                raise BadInput(f"a rollback is on its way already ({other}): wait until it has ended")
            case ["unknown", *known]:
                versions = ", ".join(map(str, sorted(map(Version.parse, known))))
                raise BadInput(f"version {target} has no checkpoint (any more): go back to one of {versions}")
            case _:
                raise BadInput("the cluster is stopping: go back when it runs again")

    def begin(self, operation: str, sha256: str) -> None:
        """requested ─▶ preparing: every serving stage loads the checkpoint's weights; nothing is committed meanwhile."""
        self.broker.call(_BEGIN, operation, sha256, f"{self.broker.clock.now():.6f}")

    def forget_checkpoint(self, version: Version) -> str | None:
        """Strike a checkpoint off the list, unless something needs it: its directory, which may be removed now."""
        answer = self.broker.call(_FORGET_CHECKPOINT, self.run, str(version))
        return str(answer[1]) if answer[0] == "ok" else None
