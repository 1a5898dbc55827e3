"""What the cluster says about a client's items, as frozen values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lemix.answers import VersionSpans
from lemix_common.ids import ItemId
from lemix_common.logprobs import TokenLogprob

EndState = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensGenerated:
    """More tokens, the first of them at position ``index`` of the generation."""

    item: ItemId
    index: int
    tokens: tuple[int, ...]
    weights_version: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, if asked for."""


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


def read_replies(fields: Mapping[str, str]) -> Iterator[Reply]:
    """What an entry of a reply stream says, as the cluster's Lua wrote it: an iteration's tokens, or an item's end."""
    match fields["event"]:
        case "tokens":
            for item, index, tokens, version, logprobs in json.loads(fields["said"]):
                yield TokensGenerated(
                    item=ItemId(item),
                    index=int(index),
                    tokens=tuple(tokens),
                    weights_version=version,
                    logprobs=tuple(map(TokenLogprob.of, logprobs)),
                )
        case "done" | "failed" | "cancelled" as state:
            yield _ended(ItemId(fields["item"]), state, fields)
        case event:
            raise ValueError(f"unknown reply {event!r}")


def end_in_hash(item: ItemId, fields: Mapping[str, str]) -> ItemEnded | None:
    """The end that an item's hash tells of, if it has ended."""
    state: Any = fields.get("state")
    return _ended(item, state, fields) if state in ("done", "failed", "cancelled") else None


def _ended(item: ItemId, state: EndState, fields: Mapping[str, str]) -> ItemEnded:
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
    item: ItemId,
    index: int,
    tokens: Sequence[int],
    spans: VersionSpans,
    logprobs: Sequence[TokenLogprob] = (),
) -> Iterator[TokensGenerated]:
    """Tokens, the first of them at ``index``, cut where their version changes."""
    ends = [begin for begin, _ in spans[1:]] + [index + len(tokens)]
    for (begin, version), end in zip(spans, ends, strict=True):
        first = max(begin, index)
        cut = slice(first - index, max(first, end) - index)
        if part := tuple(tokens[cut]):
            yield TokensGenerated(
                item=item, index=first, tokens=part, weights_version=version, logprobs=tuple(logprobs[cut])
            )
