"""The gate: before a version is served, its loss on held-out examples is compared with the served version's.

The examples are scored as items of the cluster, pinned to the version that is judged, while every stage holds it and
nobody is served by it. Their ids follow from version and examples, so a judgement that is begun again finds what was
scored before. A version that does worse by more than the margin is held back: training goes on from it, its files go,
and its examples are done when a later version that contains them is served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix_common.broker import NOTICE, Broker, Lua
from lemix_common.store.items import Items
from lemix_common.store.rollbacks import WITHDRAWAL

_JUDGED = Lua(
    "version_judged",
    """
local id, sha256, losses, against = ARGV[1], ARGV[2], cjson.decode(ARGV[3]), ARGV[4]
local state, version = unpack(redis.call('HMGET', K.operation(id), 'state', 'version'))
if state ~= 'judging' then return {'stale'} end
redis.call('HSET', K.operation(id), 'held_out_loss', losses[version], 'against_loss', losses[against])
for judged, loss in pairs(losses) do
  if redis.call('EXISTS', K.version(judged)) == 1 then
    redis.call('HSET', K.version(judged), 'held_out_loss', loss, 'held_out_sha256', sha256)
  end
end
return {'ok'}
""",
)

_HOLD_BACK = Lua(
    "hold_back",
    NOTICE
    + WITHDRAWAL
    + """
local id, reason, now = unpack(ARGV)
local state, run, version, step, sha256, loss, against = unpack(redis.call(
  'HMGET', K.operation(id), 'state', 'run', 'version', 'step', 'sha256', 'held_out_loss', 'against'))
if state ~= 'judging' then return {'stale'} end
redis.call('HSET', K.run(run), 'held_back', step)
redis.call('XADD', K.version_log, 'MAXLEN', '~', 10000, '*', 'version', version, 'parent', against, 'run', run,
           'step', step, 'examples', 0, 'loss', redis.call('HGET', K.step(run, step), 'loss') or '', 'sha256', sha256,
           'verdict', 'held back', 'held_out_loss', loss or '', 'reason', reason, 'judged_at', now)
redis.call('HSET', K.operation(id), 'ends_as', 'held_back')
withdraw(id, version, reason)
return {'ok'}
""",
)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The examples that versions are judged by."""

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Prompt and reference of each."""
    sha256: str
    """Losses are compared only if they are of the same examples."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Calls about judging versions."""

    broker: Broker

    def held_out(self) -> HeldOut | None:
        """The examples to judge by; None: every version is served."""
        text: Any = self.broker.again(lambda: self.broker.client.get(self.broker.keys.held_out))
        if not text:
            return None
        pairs = tuple((tuple(prompt), tuple(reference)) for prompt, reference in json.loads(text))
        return HeldOut(pairs, hashlib.sha256(str(text).encode()).hexdigest())

    def known_loss(self, version: str, held_out: HeldOut) -> float | None:
        """What a version made of these examples, if it was judged by them."""
        fields = self.broker.hash(self.broker.keys.version(version))
        is_same = fields.get("held_out_sha256") == held_out.sha256
        return float(fields["held_out_loss"]) if is_same else None

    def submit(self, version: str, held_out: HeldOut) -> list[str]:
        """Have the examples scored by a version that every stage holds; returns the items. `Refused`: not all were taken."""
        names = []
        for index, (prompt, reference) in enumerate(held_out.pairs):
            item = f"judge-{version}-{held_out.sha256[:8]}-{index}"
            about = {
                "kind": "score",
                "tokens": len(prompt) + len(reference),
                "reference_tokens": len(reference),
                "pinned_version": version,
            }
            Items(self.broker).submit(item, about, {"prompt": prompt, "reference": reference})
            names.append(item)
        return names

    def judged(self, operation: str, held_out: HeldOut, losses: Mapping[str, float], *, against: str) -> None:
        """Record what the judged version and the one it is compared with made of the examples."""
        texts = {version: f"{loss:.9g}" for version, loss in losses.items()}
        self.broker.call(_JUDGED, operation, held_out.sha256, texts, against)

    def hold_back(self, operation: str, reason: str) -> None:
        """judging ─▶ withdrawn: the version isn't served."""
        self.broker.call(_HOLD_BACK, operation, reason, f"{self.broker.clock.now():.6f}")

    def ends(self, items: Sequence[str]) -> list[dict[str, str]]:
        """The scored items as they are now."""
        return self.broker.hashes(self.broker.keys.item(item) for item in items)
