"""Training steps of a run: planned once, run in attempts, committed by compare-and-set.

A step's contents are a pure function of submission order and settings. An *attempt* is one try to compute a step with
given members; a lost member means another attempt. The last of the members' stages to report its gradients commits
the step, in Redis, whoever leads; only then do the optimizers run. Where steps overlap, an attempt goes on with the
next step before the one before is committed.

If a loss or gradient isn't finite, nothing is committed. Where it isn't clear which example is to blame, since several
were added up, the step is taken apart: it is computed again with each example by itself. An example that is to blame is
dead-lettered, and the step computed again without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix_common.broker import LEADER_ONLY, NOTICE, Broker, Entry, Lua
from lemix_common.store.items import DEAD_LETTER, REPLY, Call, fence

_PLAN = Lua(
    "plan_step",
    LEADER_ONLY
    + """
local run, step, cursor, items, fields = ARGV[2], tonumber(ARGV[3]), ARGV[4], cjson.decode(ARGV[5]), cjson.decode(ARGV[6])
if tonumber(redis.call('HGET', K.run(run), 'planned')) ~= step - 1 then return {'stale'} end
for _, item in ipairs(items) do
  if redis.call('HGET', K.item(item), 'state') ~= 'queued' then return {'changed'} end
end
for name, value in pairs(fields) do redis.call('HSET', K.step(run, step), name, value) end
for _, item in ipairs(items) do
  redis.call('HSET', K.item(item), 'state', 'planned', 'step', step)
  redis.call('ZREM', K.deadlines, item) -- its step is fixed
end
redis.call('HSET', K.run(run), 'planned', step)
redis.call('XTRIM', K.examples(run), 'MINID', cursor)
redis.call('XDEL', K.examples(run), cursor)
local flushes, ahead = cjson.decode(redis.call('HGET', K.run(run), 'flushes') or '[]'), {}
for _, flush in ipairs(flushes) do
  if #redis.call('XRANGE', K.examples(run), '-', flush, 'COUNT', 1) > 0 then ahead[#ahead + 1] = flush end
end
redis.call('HSET', K.run(run), 'flushes', #ahead > 0 and cjson.encode(ahead) or '[]')
return {'ok'}
""",
)

_DROP_EXAMPLES = Lua(
    "drop_examples",
    LEADER_ONLY + "for i = 3, #ARGV do redis.call('XDEL', K.examples(ARGV[2]), ARGV[i]) end\nreturn {'ok'}",
)

_FLUSH = Lua(
    "flush",
    NOTICE
    + """
local run = ARGV[1]
local newest = redis.call('XREVRANGE', K.examples(run), '+', '-', 'COUNT', 1)
if #newest > 0 then
  local flushes = cjson.decode(redis.call('HGET', K.run(run), 'flushes') or '[]')
  if flushes[#flushes] ~= newest[1][1] then flushes[#flushes + 1] = newest[1][1] end
  redis.call('HSET', K.run(run), 'flushes', cjson.encode(flushes))
  notice('FlushRequested', 'run', run)
end
return {redis.call('HGET', K.run(run), 'planned'), #newest > 0 and newest[1][1] or ''}
""",
)

_START_STEP = Lua(
    "start_step",
    LEADER_ONLY
    + NOTICE
    + """
local run, step, weights, members, shard_nodes, epochs, seen_attempt, seen_last, seen_committed = unpack(ARGV, 2, 10)
local at = redis.call('HMGET', K.run(run), 'committed', 'lineage', 'attempt', 'attempt_last', 'concluded')
local attempt, last = at[3] or '0', at[4] or '0'
if redis.call('HEXISTS', K.run(run), 'rolling_back') == 1 then return {'stale'} end
if at[1] ~= seen_committed or attempt ~= seen_attempt then return {'stale'} end
local stages = tonumber(redis.call('HGET', K.cluster_state, 'stages'))
if seen_last ~= '' then -- the attempt in flight goes on with one more step
  if last ~= seen_last or at[5] == attempt then return {'stale'} end
else
  attempt = redis.call('HINCRBY', K.run(run), 'attempt', 1)
  redis.call('HSET', K.run(run), 'attempt_step', step, 'attempt_done', step - 1,
             'expected', #cjson.decode(members) * stages, 'members', members, 'epochs', epochs)
end
redis.call('DEL', K.step_ready(run, step))
redis.call('HSET', K.run(run), 'attempt_last', step)
notice('RunStep', 'run', run, 'step', step, 'attempt', attempt, 'lineage', at[2], 'weights', weights,
       'shard_nodes', shard_nodes, 'members', members, 'epochs', epochs)
return {'ok', attempt}
""",
)

_GRADIENTS_READY = Lua(
    "gradients_ready",
    NOTICE
    + REPLY
    + DEAD_LETTER
    + """
local run, step, attempt, node, stage, report, now = unpack(ARGV)
local number = tonumber(step)
local at = redis.call('HMGET', K.run(run), 'attempt', 'attempt_done', 'attempt_last', 'expected', 'committed', 'concluded')
if at[1] ~= attempt or number > tonumber(at[3]) then return {'stale'} end
if at[6] == attempt or number <= tonumber(at[2]) then return {'ok'} end
redis.call('HSET', K.step_ready(run, step), node .. ':' .. stage, report)
if redis.call('HLEN', K.step_ready(run, step)) < tonumber(at[4]) or number > tonumber(at[2]) + 1 then return {'waiting'} end

local plan = redis.call('HMGET', K.step(run, step), 'items', 'cuts', 'shards', 'max_gradient_norm', 'reference_tokens',
                        'excluded', 'apart')
local items, cuts, shards = cjson.decode(plan[1]), cjson.decode(plan[2]), cjson.decode(plan[3])
local excluded, is_gone = cjson.decode(plan[6] or '[]'), {}
for _, example in ipairs(excluded) do is_gone[example] = true end
local stages = tonumber(redis.call('HGET', K.cluster_state, 'stages'))
local members, epochs = unpack(redis.call('HMGET', K.run(run), 'members', 'epochs'))
members, epochs = cjson.decode(members), cjson.decode(epochs)
local losses, culprits, suspects, is_finite, squares = {}, {}, {}, true, 0
for _, member in ipairs(members) do
  for s = 0, stages - 1 do
    local said = cjson.decode(redis.call('HGET', K.step_ready(run, step), member .. ':' .. s))
    for example, loss in pairs(said.losses) do losses[tonumber(example)] = loss end
    for _, example in ipairs(said.culprits) do culprits[example] = true end
    for _, example in ipairs(said.suspects) do suspects[example] = true end
    is_finite = is_finite and said.is_finite
    if member == members[1] then
      for _, square in ipairs(said.squares) do squares = squares + square end
    end
  end
end
redis.call('DEL', K.step_ready(run, step))

if not is_finite then
  -- nothing was changed by this attempt; the step is computed again, in other parts or without those to blame
  redis.call('HSET', K.run(run), 'concluded', attempt)
  local microbatch_of, with, example = {}, {}, 0
  for microbatch, size in ipairs(cuts) do
    for _ = 1, size do
      microbatch_of[example] = microbatch
      if not is_gone[example] then
        with['m' .. microbatch] = (with['m' .. microbatch] or 0) + 1
        with['s' .. shards[microbatch]] = (with['s' .. shards[microbatch]] or 0) + 1
      end
      example = example + 1
    end
  end
  local by_loss = next(culprits) ~= nil
  local blamed = by_loss and culprits or suspects
  local is_certain = next(blamed) ~= nil
  for example in pairs(blamed) do
    local microbatch = microbatch_of[example]
    is_certain = is_certain and with[by_loss and ('m' .. microbatch) or ('s' .. shards[microbatch])] == 1
  end
  if not is_certain and plan[7] ~= '1' then
    local ones, each = {}, {}
    for example = 1, #items do ones[example], each[example] = 1, example - 1 end
    redis.call('HSET', K.step(run, step), 'cuts', cjson.encode(ones), 'shards', cjson.encode(each), 'apart', '1')
  else
    local left, all = tonumber(plan[5]), next(blamed) == nil
    for example = 0, #items - 1 do
      if (all or blamed[example]) and not is_gone[example] then
        local item = items[example + 1]
        local why = 'its loss or gradient is not finite (step ' .. step .. ')'
        excluded[#excluded + 1] = example
        left = left - tonumber(redis.call('HGET', K.item(item), 'reference_tokens') or '0')
        redis.call('HSET', K.item(item), 'state', 'failed', 'ended_at', now, 'reason', why, 'dead_lettered', '1')
        redis.call('DEL', K.item_payload(item))
        redis.call('EXPIRE', K.item(item), math.ceil(redis.call('HGET', K.settings, 'result_ttl_s') or 3600))
        redis.call('HINCRBY', K.totals, 'failed', 1)
        redis.call('HINCRBY', K.totals, 'open', -1)
        reply(item, 'event', 'failed', 'reason', why)
        dead_letter(item, why, now)
      end
    end
    redis.call('HSET', K.step(run, step), 'excluded', cjson.encode(excluded), 'reference_tokens', left)
  end
  notice('StepRejected', 'run', run, 'step', step, 'attempt', attempt,
         'excluded', #excluded > 0 and cjson.encode(excluded) or '[]')
  return {'rejected'}
end

redis.call('HSET', K.run(run), 'attempt_done', step)
if step == at[3] then redis.call('HSET', K.run(run), 'concluded', attempt) end
local norm, bound = math.sqrt(squares), tonumber(plan[4] or '0')
local scale = 1
if bound > 0 then scale = math.min(1, bound / (norm + 1e-6)) end
local replay = 1
if number == tonumber(at[5]) + 1 then
  replay = 0
  local loss = 0
  for example = 0, #items - 1 do loss = loss + (losses[example] or 0) end
  redis.call('HSET', K.step(run, step), 'committed_at', now, 'loss', string.format('%.9g', loss),
             'gradient_norm', string.format('%.9g', norm), 'attempt', attempt)
  redis.call('HSET', K.run(run), 'committed', step)
  for _, item in ipairs(items) do
    if redis.call('HGET', K.item(item), 'state') == 'planned' then redis.call('HSET', K.item(item), 'state', 'committed') end
  end
end
for i, member in ipairs(members) do
  if tonumber(redis.call('HGET', K.node(member), 'epoch')) == epochs[i] then
    for s = 0, stages - 1 do redis.call('HSET', K.node(member), 'training:' .. s, step) end
  end
end
notice('StepCommitted', 'run', run, 'step', step, 'attempt', attempt, 'replay', replay,
       'scale', string.format('%.17g', scale))
return {'ok'}
""",
)

_FORGET_STEPS = Lua(
    "forget_steps",
    LEADER_ONLY
    + """
local run, upto = ARGV[2], tonumber(ARGV[3])
local first = tonumber(redis.call('HGET', K.run(run), 'kept_from') or '1')
local keep_s = math.ceil(redis.call('HGET', K.settings, 'result_ttl_s') or 3600)
for step = first, math.min(upto, first + 63) do
  for _, item in ipairs(cjson.decode(redis.call('HGET', K.step(run, step), 'items') or '[]')) do
    redis.call('DEL', K.item_payload(item))
    redis.call('EXPIRE', K.item(item), keep_s)
  end
  redis.call('EXPIRE', K.step(run, step), keep_s)
  first = step + 1
end
redis.call('HSET', K.run(run), 'kept_from', first)
return {'ok', first}
""",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run is."""

    run: str
    lineage: int
    planned: int
    committed: int
    checkpoint: int
    """The newest step a durable checkpoint covers."""
    checkpoint_directory: str
    published: int
    """The newest step a served version contains."""
    base: int
    """The step that the lineage began at: there is no older version of it."""
    attempt: int
    attempt_step: int
    """The first step of the attempt."""
    attempt_last: int
    """The last step of the attempt, so far."""
    attempt_done: int
    """The last one that it has committed, or the step before its first."""
    members: tuple[int, ...]
    epochs: tuple[int, ...]
    concluded: int
    loading: tuple[tuple[int, int], ...]
    """(node, epoch) of those told to load their training state."""
    flushes: tuple[str, ...]
    """The newest examples at each flush that isn't planned yet, in order: no step reaches across one."""
    held_back: int
    """The newest step whose version the gate didn't let through."""
    rolling_back: str
    """The rollback on its way: nothing is committed until it has ended."""
    refused: str
    """Why the newest checkpoint can't be loaded, if a stage found that."""
    kept_from: int
    """The oldest step whose payloads are still there."""

    @property
    def in_flight(self) -> bool:
        """An attempt has steps that are neither committed nor replayed."""
        return self.attempt > self.concluded


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """What a step consists of: fixed before it runs, whoever runs it.

    Examples are counted from 0 in submission order. Contiguous ones are packed into microbatches, contiguous
    microbatches are a virtual shard.
    """

    run: str
    step: int
    items: tuple[str, ...]
    """The examples."""
    cuts: tuple[int, ...]
    """How many examples each microbatch has."""
    shards: tuple[int, ...]
    """The virtual shard of each microbatch, rising."""
    reference_tokens: int
    """Of the whole step: what its loss is the mean over."""
    learning_rate: float
    weight_decay: float
    seed: int
    max_gradient_norm: float = 0.0
    """Gradients are scaled down to this norm over all parameters; 0: never."""
    optimizer: str = "adamw"
    excluded: tuple[int, ...] = ()
    """Examples that couldn't be learned from, found in earlier attempts."""
    is_apart: bool = False
    """Each example is a microbatch and a shard of its own, to find out which can't be learned from."""

    def examples_of(self, microbatch: int) -> tuple[int, ...]:
        """The examples that a microbatch computes."""
        first = sum(self.cuts[:microbatch])
        return tuple(
            example for example in range(first, first + self.cuts[microbatch]) if example not in self.excluded
        )

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Those that are computed, rising."""
        return tuple(index for index in range(len(self.cuts)) if self.examples_of(index))

    @property
    def num_shards(self) -> int:
        """Virtual shards, those without a microbatch between others included."""
        return max(self.shards, default=-1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """What a stage says of its gradients of a step."""

    losses: Mapping[int, float]
    """On the last stage: the examples of its node to their share of the step's loss."""
    squares: tuple[float, ...]
    """The sum of squares of each parameter's gradient, in model order; a tied parameter once. Empty if not finite."""
    culprits: tuple[int, ...] = ()
    """Examples whose loss isn't finite."""
    suspects: tuple[int, ...] = ()
    """Examples of a step taken apart whose gradient isn't finite: they are blamed only where no loss tells."""
    is_finite: bool = True


@dataclass(frozen=True, slots=True)
class Training:
    """Calls about a run's steps."""

    broker: Broker
    run: str

    def state(self) -> RunState:
        """The run's state now."""
        return run_state(self.run, self.broker.hash(self.broker.keys.run(self.run)))

    def queued_examples(self, count: int) -> list[Entry]:
        """The oldest examples that no step has."""
        stream = self.broker.keys.examples(self.run)
        entries: Any = self.broker.again(lambda: self.broker.client.xrange(stream, count=count))
        return [Entry(stream, entry_id, dict(fields)) for entry_id, fields in entries]

    def drop_examples(self, leader_epoch: int, entries: Sequence[Entry]) -> None:
        """Take cancelled examples out of the stream."""
        fence(self.broker.call(_DROP_EXAMPLES, leader_epoch, self.run, *(entry.id for entry in entries)))

    def plan(self, leader_epoch: int, step: PlannedStep, *, cursor: str) -> str:
        """Make a step durable; ``changed`` if an example was cancelled meanwhile, ``stale`` if the step exists."""
        fields = {
            "items": json.dumps(step.items),
            "cuts": json.dumps(step.cuts),
            "shards": json.dumps(step.shards),
            "reference_tokens": step.reference_tokens,
            "learning_rate": repr(step.learning_rate),
            "weight_decay": repr(step.weight_decay),
            "max_gradient_norm": repr(step.max_gradient_norm),
            "optimizer": step.optimizer,
            "seed": step.seed,
            "planned_at": f"{self.broker.clock.now():.6f}",
        }
        return fence(
            self.broker.call(_PLAN, leader_epoch, self.run, step.step, cursor, list(step.items), fields)
        )

    def step(self, step: int) -> PlannedStep:
        """A planned step as it was made durable."""
        fields = self.broker.hash(self.broker.keys.step(self.run, step))
        return PlannedStep(
            run=self.run,
            step=step,
            items=tuple(json.loads(fields["items"])),
            cuts=tuple(json.loads(fields["cuts"])),
            shards=tuple(json.loads(fields["shards"])),
            reference_tokens=int(fields["reference_tokens"]),
            learning_rate=float(fields["learning_rate"]),
            weight_decay=float(fields["weight_decay"]),
            seed=int(fields["seed"]),
            max_gradient_norm=float(fields["max_gradient_norm"]),
            optimizer=fields["optimizer"],
            excluded=tuple(json.loads(fields.get("excluded", "[]"))),
            is_apart=fields.get("apart") == "1",
        )

    def examples(self, items: Sequence[str]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Prompt and reference of planned examples."""
        payloads = self.broker.hashes(self.broker.keys.item_payload(item) for item in items)
        return [(tuple(json.loads(p["prompt"])), tuple(json.loads(p["reference"]))) for p in payloads]

    def flush(self) -> tuple[int, str]:
        """Have what is queued planned even as a partial step: the last planned step, and the newest example that waits."""
        planned, newest = self.broker.call(_FLUSH, self.run)
        return int(planned), str(newest)

    def start_step(
        self,
        leader_epoch: int,
        step: int,
        *,
        weights: int,
        members: Sequence[int],
        epochs: Sequence[int],
        shard_nodes: Sequence[int],
        seen: RunState,
        goes_on: bool = False,
    ) -> str:
        """Begin another attempt at a step (or a committed one's replay), or let the one in flight go on with it.

        The step is computed on the version that the step ``weights`` made. ``stale`` if the run moved on since
        ``seen``.
        """
        answer = self.broker.call(
            _START_STEP,
            leader_epoch,
            self.run,
            step,
            weights,
            list(members),
            list(shard_nodes),
            list(epochs),
            seen.attempt,
            seen.attempt_last if goes_on else "",
            seen.committed,
        )
        return fence(answer)

    def gradients_ready(
        self, step: int, attempt: int, *, node: int, stage: int, report: GradientReport
    ) -> Call:
        """The call that reports a stage's gradients; the last one commits, or rejects what isn't finite."""
        said = {
            "losses": {str(example): loss for example, loss in report.losses.items()},
            "squares": list(report.squares),
            "culprits": list(report.culprits),
            "suspects": list(report.suspects),
            "is_finite": report.is_finite,
        }
        now = f"{self.broker.clock.now():.6f}"
        return _GRADIENTS_READY, (self.run, step, attempt, node, stage, said, now)

    def forget_steps(self, leader_epoch: int, upto: int) -> None:
        """Let the payloads of steps that a durable checkpoint covers go."""
        fence(self.broker.call(_FORGET_STEPS, leader_epoch, self.run, upto))


def run_state(run: str, fields: Mapping[str, str]) -> RunState:
    """Parse a run's hash."""

    def number(name: str, default: int = 0) -> int:
        return int(fields.get(name) or default)

    return RunState(
        run=run,
        lineage=number("lineage"),
        planned=number("planned"),
        committed=number("committed"),
        checkpoint=number("checkpoint"),
        base=number("base"),
        attempt=number("attempt"),
        attempt_step=number("attempt_step"),
        attempt_last=number("attempt_last", number("attempt_step")),
        attempt_done=number("attempt_done", number("attempt_step") - 1),
        members=tuple(json.loads(fields.get("members") or "[]")),
        epochs=tuple(json.loads(fields.get("epochs") or "[]")),
        concluded=number("concluded"),
        checkpoint_directory=fields.get("checkpoint_directory", ""),
        published=number("published"),
        loading=tuple((node, epoch) for node, epoch in json.loads(fields.get("loading") or "[]")),
        flushes=tuple(json.loads(fields.get("flushes") or "[]")),
        held_back=number("held_back"),
        rolling_back=fields.get("rolling_back", ""),
        refused=fields.get("refused", ""),
        kept_from=number("kept_from", 1),
    )
