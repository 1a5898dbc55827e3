"""Items, from submission to their one end.

::

    score, generate:  queued ─▶ dispatched ─▶ running ─▶ done | failed | cancelled
                        ▲___________│____________│          (a lost node's items go back, their attempt raised)
    train:            queued ─▶ planned ─▶ committed ─▶ done     (queued ─▶ failed | cancelled; poison ─▶ failed)

Every call is idempotent: submit by item id, start, append, complete and fail by the attempt (the fencing token) and
position, dispatch and redispatch by the state they start from.

An item may be *taken back* wherever it is: by a client (cancelled), by its deadline (failed), or since its client is
gone (cancelled, if it was submitted ``while_connected``). Whatever else ends it first wins; the node that has it is told.
A training example can be taken back only while it is queued: a planned step stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix_common.broker import LEADER_ONLY, NOTICE, Broker, Entry, Lua
from lemix_common.errors import (
    BadInput,
    Fenced,
    ItemUnknown,
    QueueFull,
    ShuttingDown,
    TokenizerMismatch,
)

COORDINATORS = "coordinators"
"""Consumer group of the submission stream."""
STAGE_0 = "stage0"
"""Consumer group of a node's work stream."""
ENDED = frozenset({"done", "failed", "cancelled"})
RETRY_AFTER_S = 1.0
TAKEN_BACK_AT_ONCE = 200
"""Items that one call ends at most: the broker does nothing else meanwhile."""

REPLY = """
local function tell(client, ...)
  redis.call('XADD', K.replies(client), 'MAXLEN', '~', 100000, '*', ...)
  redis.call('EXPIRE', K.replies(client), math.ceil(redis.call('HGET', K.settings, 'result_ttl_s') or 3600))
end
local function reply(item, ...)
  local client = redis.call('HGET', K.item(item), 'client')
  if client then tell(client, 'item', item, ...) end
end
"""

TAX = """
local function add_to_tax(blocked_s, response_s)
  local blocked = redis.call('HINCRBYFLOAT', K.totals, 'blocked_s', blocked_s)
  local unblocked = redis.call('HINCRBYFLOAT', K.totals, 'response_s', response_s) - blocked
  local tax = unblocked > 0 and blocked / unblocked or 0
  redis.call('HSET', K.totals, 'training_tax', string.format('%.6f', tax))
end
"""
"""Lua: what done items waited behind training and what they took, and the tax as a field that an operator can read.

Both are counted at an item's end: the waits of items that still run, against no response, would be a tax without bounds.
"""

COUNT_OUT = """
local function count_out(version)
  if redis.call('HINCRBY', K.versions_in_flight, version, -1) <= 0 then
    redis.call('HDEL', K.versions_in_flight, version)
  end
end
"""
"""Lua: one item less keeps this version live."""

MOVE_TO_SERVED = """
local function move_to_served(item)
  local version, known = unpack(redis.call('HMGET', K.item(item), 'weights_version', 'version_spans'))
  local served = redis.call('HGET', K.versions, 'served')
  if version == served then return served end
  local have, spans = redis.call('LLEN', K.item_tokens(item)), known and cjson.decode(known) or {{0, version}}
  if spans[#spans][1] == have then spans[#spans] = nil end -- it has given no token
  spans[#spans + 1] = {have, served}
  redis.call('HSET', K.item(item), 'weights_version', served, 'version_spans', cjson.encode(spans))
  count_out(version)
  redis.call('HINCRBY', K.versions_in_flight, served, 1)
  return served
end
"""
"""Lua, after `COUNT_OUT`: let an item go on upon the served version (see `updates`); returns it."""

_END = (
    REPLY
    + COUNT_OUT
    + """
local function unbind(client, item)
  redis.call('SREM', K.client_items(client), item)
  if redis.call('EXISTS', K.client_items(client)) == 0 then
    redis.call('SREM', K.clients, client)
    redis.call('DEL', K.client_alive(client))
  end
end
local function keeps_slo(item, now)
  local slo_s, slo_ttft_s, slo_itl_s, submitted, first = unpack(redis.call(
    'HMGET', K.item(item), 'slo_s', 'slo_ttft_s', 'slo_itl_s', 'submitted_at', 'first_token_at'))
  if not submitted then return nil end
  if slo_s then return now - submitted <= tonumber(slo_s) end
  if not slo_ttft_s then return nil end
  local gaps = redis.call('LLEN', K.item_tokens(item)) - 1
  local itl_s = gaps > 0 and (now - (first or now)) / gaps or 0
  return first and first - submitted <= tonumber(slo_ttft_s) and itl_s <= tonumber(slo_itl_s)
end
local function count_slo(item, state, now)
  local is_kept = keeps_slo(item, now)
  if state == 'cancelled' or is_kept == nil then return end
  redis.call('HINCRBY', K.totals, 'slo_counted', 1)
  if is_kept and state == 'done' then redis.call('HINCRBY', K.totals, 'slo_kept', 1) end
end
local function end_item(item, state, now, ...)
  local kind, version, client, bound = unpack(
    redis.call('HMGET', K.item(item), 'kind', 'weights_version', 'client', 'while_connected'))
  count_slo(item, state, now)
  redis.call('ZREM', K.deadlines, item)
  if bound == '1' and client then unbind(client, item) end
  redis.call('HSET', K.item(item), 'state', state, 'ended_at', now, ...)
  redis.call('HINCRBY', K.totals, state, 1)
  if state == 'failed' then
    redis.call('XADD', K.failures, 'MAXLEN', '~', 10000, '*', 'item', item, 'at', now, ...)
  end
  redis.call('HINCRBY', K.totals, 'open', -1)
  if kind ~= 'train' then
    if version then count_out(version) end
    local keep_s = math.ceil(redis.call('HGET', K.settings, 'result_ttl_s') or 3600)
    redis.call('DEL', K.item_payload(item))
    redis.call('EXPIRE', K.item(item), keep_s)
    redis.call('EXPIRE', K.item_tokens(item), keep_s)
    redis.call('EXPIRE', K.item_logprobs(item), keep_s)
  end
end
local function close_entry(node, entry)
  redis.call('XACK', K.work(node), 'stage0', entry)
  redis.call('XDEL', K.work(node), entry)
end
"""
)

_TAKE_BACK = (
    NOTICE
    + _END
    + """
local function take_back(item, state, now, ...)
  local kind, node = unpack(redis.call('HMGET', K.item(item), 'kind', 'node'))
  end_item(item, state, now, ...)
  reply(item, 'event', state, ...)
  if kind == 'train' then
    redis.call('DEL', K.item_payload(item))
    redis.call('EXPIRE', K.item(item), math.ceil(redis.call('HGET', K.settings, 'result_ttl_s') or 3600))
  elseif node then
    notice('ItemCancelled', 'item', item, 'node', node)
  end
end
local function can_take_back(item)
  local state = redis.call('HGET', K.item(item), 'state')
  return state == 'queued' or state == 'dispatched' or state == 'running', state
end
local function take_back_all_of(client, now, most)
  local taken = {}
  for i, item in ipairs(redis.call('SMEMBERS', K.client_items(client))) do
    if i > most then break end
    if can_take_back(item) then take_back(item, 'cancelled', now) end
    unbind(client, item)
    taken[i] = item
  end
  return taken
end
"""
)
"""Lua: end an item that nobody wants any more, and tell the node that has it."""

_GIVE = """
local function give(item, attempt, node, now)
  redis.call('HSET', K.item(item), 'state', 'dispatched', 'node', node, 'dispatched_at', now)
  local priority, accepted_at = unpack(redis.call('HMGET', K.item(item), 'priority', 'accepted_at'))
  redis.call('XADD', K.work(node), '*', 'item', item, 'attempt', attempt,
             'priority', priority or '0', 'accepted_at', accepted_at or '0')
end
"""
"""Lua: put an item into a node's stream, with what decides its turn there."""

DEAD_LETTER = """
local function dead_letter(item, reason, now)
  redis.call('XADD', K.dead_letters, 'MAXLEN', '~', 10000, '*', 'item', item, 'reason', reason, 'at', now)
  redis.call('HINCRBY', K.totals, 'dead_lettered', 1)
end
"""

_SHOW_CLIENT = """
local function client_expiry_s() return redis.call('HGET', K.settings, 'client_expiry_s') or '10' end
local function show_client(client)
  redis.call('SET', K.client_alive(client), '1', 'PX', math.ceil(1000 * client_expiry_s()))
end
"""
"""Lua: the client lives."""

_SUBMIT = Lua(
    "submit",
    _SHOW_CLIENT
    + """
local item, fields, payload, now = ARGV[1], cjson.decode(ARGV[2]), cjson.decode(ARGV[3]), tonumber(ARGV[4])
local state = redis.call('HGET', K.item(item), 'state')
if state then return {'exists', state} end
if redis.call('HGET', K.cluster_state, 'state') ~= 'running' then return {'stopping'} end
local tokenizer = redis.call('HGET', K.model, 'tokenizer_sha256')
if tokenizer and fields.tokenizer_sha256 and fields.tokenizer_sha256 ~= tokenizer then return {'mismatch'} end
if fields.deadline_at and tonumber(fields.deadline_at) <= now then return {'late'} end
local open = tonumber(redis.call('HGET', K.totals, 'open') or '0')
if open >= tonumber(redis.call('HGET', K.settings, 'max_queue')) then
  redis.call('HINCRBY', K.totals, 'refused', 1)
  return {'full', open}
end
for name, value in pairs(fields) do redis.call('HSET', K.item(item), name, value) end
for name, value in pairs(payload) do redis.call('HSET', K.item_payload(item), name, value) end
redis.call('HSET', K.item(item), 'state', 'queued')
if fields.kind == 'generate' and not fields.on_update then
  redis.call('HSET', K.item(item), 'on_update', redis.call('HGET', K.settings, 'on_update') or 'finish')
end
redis.call('HINCRBY', K.totals, 'submitted', 1)
redis.call('HINCRBY', K.totals, 'open', 1)
if fields.deadline_at then redis.call('ZADD', K.deadlines, fields.deadline_at, item) end
if fields.while_connected == '1' then
  redis.call('SADD', K.clients, fields.client)
  redis.call('SADD', K.client_items(fields.client), item)
  show_client(fields.client)
end
local entry
if fields.kind == 'train' then
  entry = redis.call('XADD', K.examples(fields.run), '*', 'item', item,
                     'tokens', fields.tokens, 'reference_tokens', fields.reference_tokens)
else
  entry = redis.call('XADD', K.submissions, '*', 'item', item, 'kind', fields.kind, 'tokens', fields.tokens)
end
-- by the broker's clock, so that whose clock is slow doesn't get ahead of others
redis.call('HSET', K.item(item), 'accepted_at', string.format('%.3f', tonumber(string.match(entry, '^%d+')) / 1000))
return {'accepted', 'queued'}
""",
)

_DISPATCH = Lua(
    "dispatch",
    LEADER_ONLY
    + _GIVE
    + """
local entry, item, node, now, about = ARGV[2], ARGV[3], ARGV[4], ARGV[5], cjson.decode(ARGV[6])
local fresh = redis.call('HGET', K.item(item), 'state') == 'queued'
if fresh then
  for name, value in pairs(about) do redis.call('HSET', K.item(item), name, value) end
  give(item, redis.call('HINCRBY', K.item(item), 'attempt', 1), node, now)
end
redis.call('XACK', K.submissions, 'coordinators', entry)
redis.call('XDEL', K.submissions, entry)
return {fresh and 'ok' or 'stale'}
""",
)

_REDISPATCH = Lua(
    "redispatch",
    LEADER_ONLY
    + NOTICE
    + _END
    + _GIVE
    + DEAD_LETTER
    + """
local node, entry, item, seen_attempt, target, reason, now = unpack(ARGV, 2, 8)
close_entry(node, entry)
local state, deliveries, current = unpack(redis.call('HMGET', K.item(item), 'state', 'deliveries', 'attempt'))
if (state ~= 'dispatched' and state ~= 'running') or current ~= seen_attempt then return {'stale'} end
local is_suspect = state == 'running' and
  redis.call('LLEN', K.item_tokens(item)) == tonumber(redis.call('HGET', K.item(item), 'tokens_at_start') or '0')
if is_suspect and tonumber(deliveries) >= tonumber(redis.call('HGET', K.settings, 'max_deliveries')) then
  local why = 'given up after ' .. deliveries .. ' deliveries: ' .. reason
  end_item(item, 'failed', now, 'reason', why, 'dead_lettered', '1')
  reply(item, 'event', 'failed', 'reason', why)
  dead_letter(item, why, now)
  return {'dead'}
end
local attempt = redis.call('HINCRBY', K.item(item), 'attempt', 1)
if target == '' then
  redis.call('HSET', K.item(item), 'state', 'queued')
  redis.call('XADD', K.submissions, '*', 'item', item, 'kind', redis.call('HGET', K.item(item), 'kind'), 'tokens', 0)
else
  give(item, attempt, target, now)
end
return {'ok'}
""",
)

_START = Lua(
    "start",
    _END
    + MOVE_TO_SERVED
    + """
local item, attempt, node, worker, now = unpack(ARGV)
local at = redis.call('HMGET', K.item(item), 'state', 'attempt', 'node', 'weights_version', 'pinned_version', 'on_update')
if at[2] ~= attempt or at[3] ~= node or (at[1] ~= 'dispatched' and at[1] ~= 'running') then return {'stale'} end
if at[5] then
  local live = redis.call('HMGET', K.versions, 'served', 'draining', 'preparing')
  if at[5] ~= live[1] and at[5] ~= live[2] and at[5] ~= live[3] then
    end_item(item, 'failed', now, 'reason', 'version ' .. at[5] .. ' is on no stage any more')
    return {'stale'}
  end
end
if not at[4] then
  at[4] = at[5] or redis.call('HGET', K.versions, 'served')
  redis.call('HSET', K.item(item), 'weights_version', at[4])
  redis.call('HINCRBY', K.versions_in_flight, at[4], 1)
elseif not at[5] and (at[6] == 'rebuild' or redis.call('HEXISTS', K.version(at[4]), 'cleared_at') == 1) then
  move_to_served(item) -- it is computed from its beginning anyway
end
if at[1] == 'dispatched' then
  -- in a row: an item that got further since its last start is not what its stages were lost by
  local have = redis.call('LLEN', K.item_tokens(item))
  if have > tonumber(redis.call('HGET', K.item(item), 'tokens_at_start') or '0') then
    redis.call('HSET', K.item(item), 'deliveries', 0)
  end
  redis.call('HINCRBY', K.item(item), 'deliveries', 1)
  redis.call('HSET', K.item(item), 'tokens_at_start', have)
end
redis.call('HSET', K.item(item), 'state', 'running', 'worker', worker, 'started_at', now)
return {'ok', redis.call('HGETALL', K.item(item)), redis.call('HGETALL', K.item_payload(item)),
        redis.call('LRANGE', K.item_tokens(item), 0, -1), redis.call('LRANGE', K.item_logprobs(item), 0, -1)}
""",
)

CURRENT = """
local function is_current(item, attempt)
  local at = redis.call('HMGET', K.item(item), 'state', 'attempt')
  return at[1] == 'running' and at[2] == attempt
end
"""
"""Lua: whether an attempt at an item may still say something."""

_APPEND = Lua(
    "append_tokens",
    REPLY
    + CURRENT
    + """
local entries, now = cjson.decode(ARGV[1]), ARGV[2]
local said, clients, answers = {}, {}, {}
local function append(item, attempt, position, tokens, logprobs)
  if not is_current(item, string.format('%d', attempt)) then return 'stale' end
  local have = redis.call('LLEN', K.item_tokens(item))
  if position > have then return 'gap' end
  local fresh, fresh_logprobs = {}, {}
  for i, token in ipairs(tokens) do
    if position + i > have then
      fresh[#fresh + 1] = string.format('%d', token)
      fresh_logprobs[#fresh_logprobs + 1] = logprobs[i] -- none, or a text a token, which the client reads
    end
  end
  if #fresh == 0 then return 'ok' end
  redis.call('RPUSH', K.item_tokens(item), unpack(fresh))
  if #fresh_logprobs > 0 then redis.call('RPUSH', K.item_logprobs(item), unpack(fresh_logprobs)) end
  if have == 0 then redis.call('HSET', K.item(item), 'first_token_at', now) end
  local client, version = unpack(redis.call('HMGET', K.item(item), 'client', 'weights_version'))
  if client then
    if not said[client] then said[client], clients[#clients + 1] = {}, client end
    table.insert(said[client], string.format('[%s,%d,[%s],%s,[%s]]', cjson.encode(item), have,
      table.concat(fresh, ','), cjson.encode(version), table.concat(fresh_logprobs, ',')))
  end
  return 'ok'
end
for i, entry in ipairs(entries) do answers[i] = append(unpack(entry)) end
for _, client in ipairs(clients) do
  tell(client, 'event', 'tokens', 'said', '[' .. table.concat(said[client], ',') .. ']')
end
return answers
""",
)

_COMPLETE = Lua(
    "complete",
    _END
    + TAX
    + CURRENT
    + """
local item, attempt, node, entry, result, now = unpack(ARGV)
if not is_current(item, attempt) then close_entry(node, entry) return {'stale'} end
end_item(item, 'done', now, 'result', result)
local submitted, blocked_s = unpack(redis.call('HMGET', K.item(item), 'submitted_at', 'blocked_s'))
if submitted then add_to_tax(blocked_s or '0', string.format('%.6f', now - submitted)) end
local version, spans = unpack(redis.call('HMGET', K.item(item), 'weights_version', 'version_spans'))
reply(item, 'event', 'done', 'result', result, 'weights_version', version, 'version_spans', spans or '')
close_entry(node, entry)
return {'ok'}
""",
)

_FAIL = Lua(
    "fail",
    _END
    + CURRENT
    + """
local item, attempt, node, entry, reason, now = unpack(ARGV)
if not is_current(item, attempt) then close_entry(node, entry) return {'stale'} end
end_item(item, 'failed', now, 'reason', reason)
reply(item, 'event', 'failed', 'reason', reason)
close_entry(node, entry)
return {'ok'}
""",
)

_CANCEL = Lua(
    "cancel",
    _TAKE_BACK
    + """
local item, now = ARGV[1], ARGV[2]
local can, state = can_take_back(item)
if not state then return {'unknown'} end
if state == 'planned' or state == 'committed' then return {'late', state} end
if not can then return {'ended', state} end
take_back(item, 'cancelled', now)
return {'cancelled', 'cancelled'}
""",
)

_END_OVERDUE = Lua(
    "end_overdue",
    LEADER_ONLY
    + _TAKE_BACK
    + """
local now, most = ARGV[2], ARGV[3]
local overdue = redis.call('ZRANGEBYSCORE', K.deadlines, '-inf', now, 'LIMIT', 0, most)
for _, item in ipairs(overdue) do
  local can, state = can_take_back(item)
  if can then
    take_back(item, 'failed', now, 'reason', 'deadline passed while ' .. state)
  else
    redis.call('ZREM', K.deadlines, item)
  end
end
return {'ok', unpack(overdue)}
""",
)

_CANCEL_ABANDONED = Lua(
    "cancel_abandoned",
    LEADER_ONLY
    + _TAKE_BACK
    + """
local now, most, abandoned = ARGV[2], tonumber(ARGV[3]), {'ok'}
for _, client in ipairs(redis.call('SMEMBERS', K.clients)) do
  if #abandoned > most then break end
  if redis.call('EXISTS', K.client_alive(client)) == 0 then
    for _, item in ipairs(take_back_all_of(client, now, most)) do abandoned[#abandoned + 1] = item end
  end
end
return abandoned
""",
)

_LEAVE = Lua(
    "leave",
    _TAKE_BACK
    + """
local client, now, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
return {'ok', unpack(take_back_all_of(client, now, most))}
""",
)

_STILL_HERE = Lua(
    "still_here",
    _SHOW_CLIENT
    + """
if redis.call('EXISTS', K.client_items(ARGV[1])) == 1 then show_client(ARGV[1]) end
return {'ok', client_expiry_s()}
""",
)

_CLOSE = Lua(
    "close_entry",
    "redis.call('XACK', K.work(ARGV[1]), 'stage0', ARGV[2])\nredis.call('XDEL', K.work(ARGV[1]), ARGV[2])",
)

_FORGET_CONSUMER = Lua(
    "forget_consumer",
    LEADER_ONLY
    + """
local node, consumer = ARGV[2], ARGV[3]
if #redis.call('XPENDING', K.work(node), 'stage0', '-', '+', 1, consumer) > 0 then return {'holds'} end
redis.call('XGROUP', 'DELCONSUMER', K.work(node), 'stage0', consumer)
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedItem:
    """An inference item that stage 0 may work on, as the broker has it."""

    item: str
    attempt: int
    entry: str
    kind: str
    version: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    tokens: tuple[int, ...]
    """Generated by earlier attempts; they stay."""
    fields: Mapping[str, str]
    logprobs: tuple[str, ...] = ()
    """Of these tokens, if asked for (see `TokenLogprob`)."""


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """Tokens that an attempt at an item generated, the first of them at ``position`` of the generation."""

    item: str
    attempt: int
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[str, ...] = ()
    """If asked for, the text of a `TokenLogprob` each."""


Call = tuple[Lua, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Items:
    """Calls about items."""

    broker: Broker

    # ---- by clients
    def submit(self, item: str, fields: Mapping[str, object], payload: Mapping[str, Sequence[int]]) -> str:
        """Accept an item; returns its state (an id that exists is a no-op). `BadInput`, `QueueFull`, `ShuttingDown`.

        ``deadline_at`` is in seconds by the cluster's clock. One with ``while_connected`` set to 1 ends with its client.
        """
        texts = {name: str(value) for name, value in fields.items()}
        ids = {name: json.dumps(list(values), separators=(",", ":")) for name, values in payload.items()}
        answer = self.broker.call(_SUBMIT, item, texts, ids, self._now())
        match answer:
            case ["accepted" | "exists", state]:
                return str(state)
            case ["full", depth]:
                raise QueueFull(int(depth), RETRY_AFTER_S)
            case ["late"]:
                raise BadInput(f"the deadline of item {item} has passed before it was queued")
            case ["mismatch"]:
                raise TokenizerMismatch(
                    f"item {item} was tokenized for another model than the cluster's: open a new Client"
                )
            case _:
                raise ShuttingDown(
                    "the cluster is not running (stopping, or not started yet); nothing was accepted"
                )

    def cancel(self, item: str) -> bool:
        """Take an item back; False if it had ended. A planned training example can't be taken out any more."""
        match self.broker.call(_CANCEL, item, self._now()):
            case ["cancelled", _]:
                return True
            case ["ended", _]:
                return False
            case ["late", state]:
                raise BadInput(
                    f"item {item} is {state}: its step is fixed, so it can't be cancelled any more"
                )
            case _:
                raise ItemUnknown(f"no item {item} (or its result has expired)")

    def still_here(self, client: str) -> float:
        """The client lives, for the items that end with it; returns for how many seconds that holds."""
        return float(self.broker.call(_STILL_HERE, client)[1])

    def leave(self, client: str) -> None:
        """Cancel what ends with this client."""
        while len(self.broker.call(_LEAVE, client, self._now(), TAKEN_BACK_AT_ONCE)) > TAKEN_BACK_AT_ONCE:
            pass

    def get(self, item: str) -> dict[str, str]:
        """The item's fields; `ItemUnknown` if there are none."""
        fields = self.broker.hash(self.broker.keys.item(item))
        if "state" not in fields:
            raise ItemUnknown(f"no item {item} (or its result has expired)")
        return fields

    def tokens(self, item: str) -> list[int]:
        """Tokens generated so far."""
        values: Any = self.broker.again(
            lambda: self.broker.client.lrange(self.broker.keys.item_tokens(item), 0, -1)
        )
        return [int(value) for value in values]

    def logprobs(self, item: str) -> list[str]:
        """Their log-probabilities, if asked for."""
        values: Any = self.broker.again(
            lambda: self.broker.client.lrange(self.broker.keys.item_logprobs(item), 0, -1)
        )
        return [str(value) for value in values]

    # ---- by the coordinator
    def dispatch(
        self, leader_epoch: int, entry: Entry, node: int, about: Mapping[str, str] | None = None
    ) -> Call:
        """The call that sends a queued item to a node (a no-op for one that is not queued any more).

        ``about``: what is expected of it there, further fields of the item.
        """
        return _DISPATCH, (leader_epoch, entry.id, entry.fields["item"], node, self._now(), dict(about or {}))

    def redispatch(
        self, leader_epoch: int, node: int, entry: Entry, *, target: int | None, reason: str
    ) -> Call:
        """The call that takes an item from a lost node to another (or back to the queue), or gives it up."""
        to = "" if target is None else target
        item, attempt = entry.fields["item"], entry.fields["attempt"]
        return _REDISPATCH, (leader_epoch, node, entry.id, item, attempt, to, reason, self._now())

    def end_overdue(self, leader_epoch: int) -> list[str]:
        """Fail items whose deadline has passed, the earliest first, so many at most as are ended at once."""
        answer = self.broker.call(_END_OVERDUE, leader_epoch, self._now(), TAKEN_BACK_AT_ONCE)
        fence(answer)
        return [str(item) for item in answer[1:]]

    def cancel_abandoned(self, leader_epoch: int) -> list[str]:
        """Cancel items whose client is gone, about so many at most as are ended at once."""
        answer = self.broker.call(_CANCEL_ABANDONED, leader_epoch, self._now(), TAKEN_BACK_AT_ONCE)
        fence(answer)
        return [str(item) for item in answer[1:]]

    def submitted(self, consumer: str, *, count: int, pending: bool, behind: str = "0") -> list[Entry]:
        """New submissions, or (``pending``) those read earlier and not dispatched, ``behind`` an entry."""
        after = behind if pending else ">"
        stream = self.broker.keys.submissions
        return self.broker.read_group(stream, COORDINATORS, consumer, block_s=0.001, count=count, after=after)

    def work_of(self, node: int) -> list[Entry]:
        """Every entry of a node's stream, pulled or not."""
        stream = self.broker.keys.work(node)
        entries: Any = self.broker.again(lambda: self.broker.client.xrange(stream))
        return [Entry(stream, entry_id, dict(fields)) for entry_id, fields in entries]

    def forget_consumer(self, leader_epoch: int, node: int, consumer: str) -> None:
        """Strike a consumer of an older placement off a node's stream, unless it still holds an entry."""
        fence(self.broker.call(_FORGET_CONSUMER, leader_epoch, node, consumer))

    # ---- by stage 0
    def start(
        self, node: int, worker: str, entries: Sequence[Entry]
    ) -> tuple[list[StartedItem], list[Entry]]:
        """Take pulled entries into work: the items to run, and the entries that were stale."""
        calls: list[Call] = [
            (_START, (entry.fields["item"], entry.fields["attempt"], node, worker, self._now()))
            for entry in entries
        ]
        started, stale = [], []
        for entry, answer in zip(entries, self.broker.call_many(calls), strict=True):
            if answer[0] == "stale":
                stale.append(entry)
            else:
                started.append(_started(entry, *answer[1:]))
        return started, stale

    def append_tokens(self, chosen: Sequence[ChosenTokens]) -> Call:
        """The call that gives clients generated tokens; it answers for each item ``ok``, ``gap`` or ``stale``."""
        entries = [
            (tokens.item, tokens.attempt, tokens.position, tokens.tokens, tokens.logprobs)
            for tokens in chosen
        ]
        return _APPEND, (entries, self._now())

    def complete(self, started: StartedItem, node: int, result: Mapping[str, object]) -> Call:
        """The call that ends an item as done and acknowledges its entry."""
        return _COMPLETE, (started.item, started.attempt, node, started.entry, dict(result), self._now())

    def fail(self, started: StartedItem, node: int, reason: str) -> Call:
        """The call that ends an item as failed and acknowledges its entry."""
        return _FAIL, (started.item, started.attempt, node, started.entry, reason, self._now())

    def close_entry(self, node: int, entry: str) -> Call:
        """The call that drops an entry whose item has gone elsewhere."""
        return _CLOSE, (node, entry)

    def _now(self) -> str:
        return f"{self.broker.clock.now():.6f}"


def fence(answer: Sequence[object]) -> str:
    """The first word of a leader's call; `Fenced` if another coordinator leads."""
    if answer[0] == "fenced":
        raise Fenced("another coordinator leads")
    return str(answer[0])


def pairs(values: Sequence[str]) -> dict[str, str]:
    """A hash as Lua returns it: names and values in turn."""
    return dict(zip(values[::2], values[1::2], strict=True))


def _started(entry: Entry, fields: Any, payload: Any, tokens: Any, logprobs: Any) -> StartedItem:
    known = fields if isinstance(fields, dict) else pairs(fields)
    ids = {
        k: tuple(json.loads(v)) for k, v in (payload if isinstance(payload, dict) else pairs(payload)).items()
    }
    return StartedItem(
        item=entry.fields["item"],
        attempt=int(entry.fields["attempt"]),
        entry=entry.id,
        kind=known["kind"],
        version=known["weights_version"],
        prompt=ids["prompt"],
        reference=ids.get("reference", ()),
        tokens=tuple(int(token) for token in tokens),
        fields=known,
        logprobs=tuple(str(text) for text in logprobs),
    )
