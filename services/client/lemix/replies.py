"""What the cluster says about a client's items, as frozen values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lemix.answers import VersionSpans
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
    version_spans: VersionSpans = ()

    @property
    def weights_version(self) -> str:
        """The only one, or of the first token; '' if it never ran."""
        return self.version_spans[0][1] if self.version_spans else ""


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
                version_spans=read_spans(fields),
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
        version_spans=read_spans(fields),
    )


def read_spans(fields: Mapping[str, str]) -> VersionSpans:
    """The versions that a reply or an item's hash names; only an item that was moved has spans."""
    if spans := fields.get("version_spans"):
        return tuple((int(index), str(version)) for index, version in json.loads(spans))
    version = fields.get("weights_version", "")
    return ((0, version),) if version else ()


def tokens_of_versions(
    item: ItemId, index: int, tokens: Sequence[int], spans: VersionSpans
) -> Iterator[TokensGenerated]:
    """Tokens, the first of them at ``index``, cut where their version changes."""
    ends = [begin for begin, _ in spans[1:]] + [index + len(tokens)]
    for (begin, version), end in zip(spans, ends, strict=True):
        first = max(begin, index)
        if part := tuple(tokens[first - index : max(first, end) - index]):
            yield TokensGenerated(item=item, index=first, tokens=part, weights_version=version)
