"""What the cluster says about a client's items, as frozen values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lemix_common.ids import ItemId

EndState = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensGenerated:
    """More tokens, the first of them at position ``index`` of the generation."""

    item: ItemId
    index: int
    tokens: tuple[int, ...]
    weights_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemEnded:
    """The item's one end."""

    item: ItemId
    state: EndState
    result: str = ""
    """JSON, if done."""
    reason: str = ""
    """If failed."""
    weights_version: str = ""


Reply = TokensGenerated | ItemEnded


def read_reply(fields: Mapping[str, str]) -> Reply:
    """A reply as the cluster's Lua wrote it."""
    item, event = ItemId(fields["item"]), fields["event"]
    match event:
        case "token":
            return TokensGenerated(
                item=item,
                index=int(fields["index"]),
                tokens=tuple(json.loads(fields["tokens"])),
                weights_version=fields["weights_version"],
            )
        case "done" | "failed" | "cancelled":
            return ItemEnded(
                item=item,
                state=event,
                result=fields.get("result", ""),
                reason=fields.get("reason", ""),
                weights_version=fields.get("weights_version", ""),
            )
        case _:
            raise ValueError(f"unknown reply {event!r}")


def end_in_hash(item: ItemId, fields: Mapping[str, str]) -> ItemEnded | None:
    """The end that an item's hash tells of, if it has ended."""
    state: Any = fields.get("state")
    if state not in ("done", "failed", "cancelled"):
        return None
    return ItemEnded(
        item=item,
        state=state,
        result=fields.get("result", ""),
        reason=fields.get("reason", ""),
        weights_version=fields.get("weights_version", ""),
    )
