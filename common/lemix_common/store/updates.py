"""What becomes of a running request when a newer version is served.

It finishes on the version it began with (``finish``), or goes on upon the served one (``rebuild``), as its client asked
when it was submitted, else as the setting says. A request that goes on is *moved*: one call makes the served version the
item's, then its prompt and the tokens it has are prefilled on that version, and decoding continues. Tokens it has stay;
``version_spans`` says with which token each of its versions begins, so that every token's version is known. The call is
made between two iterations of the request, after its tokens have been reported, so the last span begins where it was
moved. Killed before that call, it goes on upon the version it had; after it, upon the new one.

A version that drains for longer than ``max_drain_s`` while the next one waits for its place is *cleared*: whatever still
runs on it is moved, ``finish`` or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from lemix_common.broker import LEADER_ONLY, NOTICE, Broker, Lua
from lemix_common.store.items import COUNT_OUT, CURRENT, MOVE_TO_SERVED, Call, fence

_MOVE = Lua(
    "move_item",
    COUNT_OUT
    + MOVE_TO_SERVED
    + CURRENT
    + """
local item, attempt, node, epoch = unpack(ARGV)
if not is_current(item, attempt) then return {'stale'} end
if redis.call('HGET', K.node(node), 'epoch') ~= epoch then -- it starts afresh, perhaps without the served version
  return {'ok', redis.call('HGET', K.item(item), 'weights_version')}
end
return {'ok', move_to_served(item)}
""",
)

_CLEAR = Lua(
    "clear_draining",
    LEADER_ONLY
    + NOTICE
    + """
local version, now = ARGV[2], ARGV[3]
if redis.call('HGET', K.versions, 'draining') ~= version then return {'stale'} end
if redis.call('HSETNX', K.version(version), 'cleared_at', now) == 0 then return {'stale'} end
notice('VersionCleared', 'version', version)
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True)
class Updates:
    """Calls that take running items from one version to another."""

    broker: Broker

    def move(self, item: str, attempt: int, *, node: int, epoch: int) -> Call:
        """The call that lets an item go on upon the served version; it answers the version the item is on then."""
        return _MOVE, (item, attempt, node, epoch)

    def clear_draining(self, leader_epoch: int, version: str) -> bool:
        """Have every item leave the draining version; False if that was said before, or it is retired."""
        now = f"{self.broker.clock.now():.6f}"
        return fence(self.broker.call(_CLEAR, leader_epoch, version, now)) == "ok"
