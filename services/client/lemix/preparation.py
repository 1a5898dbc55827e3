"""From an item to what is put in the queue: tokenized, checked and counted; nothing here talks to the cluster."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import get_args

from lemix.items import GenerateItem, Item, OverLongRule, ScoreItem, TrainItem, UpdateRule
from lemix.limits import Ids, reject_over_long, split_example, truncate_prompt
from lemix.tokenization import ModelCard, Tokenization
from lemix.urgency import check_urgency, urgency_fields
from lemix_common.errors import BadInput
from lemix_common.ids import ItemId, check_item_id, new_item_id
from lemix_common.sampling import Stopping
from lemix_common.text_stream import last_piece


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedItem:
    """An item as `Items.submit` takes it."""

    item_id: ItemId
    kind: str
    fields: dict[str, object]
    payload: dict[str, Ids]
    is_named: bool
    """The caller chose the id, so it may exist already."""
    deadline_s: float | None = None
    """From its submission."""


def prepare(item: Item, tokenization: Tokenization) -> list[PreparedItem]:
    """Tokenize and check; more than one part only of a training example whose rule is ``split``."""
    try:
        _check_rule(item)
        check_urgency(item)
        parts, urgency = _parts(item, tokenization), urgency_fields(item)
        return [replace(part, fields=part.fields | urgency, deadline_s=item.deadline_s) for part in parts]
    except BadInput as error:
        where = getattr(item, "where", "")
        raise (type(error)(f"{where}: {error}") if where else error) from None


def _parts(item: Item, tokenization: Tokenization) -> list[PreparedItem]:
    match item:
        case GenerateItem():
            return [_generate(item, tokenization)]
        case ScoreItem():
            return [_score(item, tokenization)]
        case TrainItem():
            return _train(item, tokenization)


def _check_rule(item: Item) -> None:
    if item.over_long not in get_args(OverLongRule):
        raise BadInput(f"over-long rule {item.over_long!r}: use {', '.join(get_args(OverLongRule))}")
    if item.over_long == "split" and not isinstance(item, TrainItem):
        raise BadInput("over-long rule 'split' is for training examples; use reject or truncate")


def _generate(item: GenerateItem, tokenization: Tokenization) -> PreparedItem:
    _check_length(item)
    _check_stopping(item.stopping, tokenization)
    if item.on_update not in (None, *get_args(UpdateRule)):
        raise BadInput(f"on_update {item.on_update!r}: use {' or '.join(get_args(UpdateRule))}")
    prompt = tokenization.prompt_ids(item.prompt)
    fitted = _fit(prompt, item.max_new_tokens, "new", item.over_long, tokenization.card)
    fields: dict[str, object] = {
        "tokens": len(fitted) + item.max_new_tokens,
        "max_new_tokens": item.max_new_tokens,
        "ignore_eos": int(item.ignore_eos),
        **asdict(item.sampling),
        "stop_ids": json.dumps(item.stopping.stop_ids),
        "stop_strings": json.dumps(item.stopping.stop_strings),
        "include_stop": int(item.stopping.include_stop),
        "prompt_end": json.dumps(last_piece(tokenization.decode, fitted)),
    }
    if item.on_update is not None:
        fields["on_update"] = item.on_update
    return _prepared("generate", item.item_id, fitted, (), _about(tokenization) | fields)


def _check_length(item: GenerateItem) -> None:
    if type(item.max_new_tokens) is not int or item.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens {item.max_new_tokens}: ask for at least 1")
    if item.sampling.min_tokens > item.max_new_tokens:
        raise BadInput(
            f"min_tokens {item.sampling.min_tokens} is more than max_new_tokens {item.max_new_tokens}: ask for fewer"
        )


def _check_stopping(stopping: Stopping, tokenization: Tokenization) -> None:
    size = tokenization.card.vocab_size
    for stop_id in stopping.stop_ids:
        if stop_id >= size:
            raise BadInput(f"stop id {stop_id} is not in the model's vocabulary (ids 0 to {size - 1})")
    if stopping.stop_strings and tokenization.tokenizer is None:
        raise BadInput("stop strings need a tokenizer, and the cluster's model has none: give stop ids")


def _score(item: ScoreItem, tokenization: Tokenization) -> PreparedItem:
    prompt, reference = tokenization.prompt_ids(item.prompt), tokenization.reference_ids(item.reference)
    fitted = _fit(prompt, len(reference), "reference", item.over_long, tokenization.card)
    return _prepared("score", item.item_id, fitted, reference, _about(tokenization))


def _train(item: TrainItem, tokenization: Tokenization) -> list[PreparedItem]:
    prompt, reference = tokenization.prompt_ids(item.prompt), tokenization.reference_ids(item.reference)
    about = _about(tokenization) | {"run": item.run}
    if item.over_long != "split":
        fitted = _fit(prompt, len(reference), "reference", item.over_long, tokenization.card)
        return [_prepared("train", item.item_id, fitted, reference, about)]
    parts = split_example(prompt, reference, tokenization.card.context_length)
    if len(parts) == 1:
        return [_prepared("train", item.item_id, *parts[0], about)]
    name = item.item_id or new_item_id()
    return [_prepared("train", f"{name}.{number}", *part, about) for number, part in enumerate(parts)]


def _fit(prompt: Ids, num_following: int, what: str, rule: OverLongRule, card: ModelCard) -> Ids:
    if rule == "truncate":
        return truncate_prompt(prompt, num_following, what, card.context_length)
    reject_over_long(prompt, num_following, what, card.context_length)
    return prompt


def _about(tokenization: Tokenization) -> dict[str, object]:
    return {"tokenizer_sha256": tokenization.card.tokenizer_sha256}


def _prepared(
    kind: str, item_id: str | None, prompt: Ids, reference: Ids, fields: dict[str, object]
) -> PreparedItem:
    counted = {"kind": kind, "tokens": len(prompt) + len(reference), "reference_tokens": len(reference)}
    return PreparedItem(
        item_id=new_item_id() if item_id is None else check_item_id(item_id),
        kind=kind,
        fields=counted | fields,
        payload={"prompt": prompt} | ({"reference": reference} if reference else {}),
        is_named=item_id is not None,
    )
