from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from lemix.items import GenerateItem, ScoreItem, TrainItem
from lemix.model_folder import open_model_folder
from lemix.tokenization import ModelCard, open_tokenization
from lemix_studies.catalogue import MENTIONS, OPENINGS, make_catalogue
from lemix_studies.demo import MODEL, demo_settings
from lemix_studies.demo_plan import DemoOptions, Exchange, change_facts, demo_arrivals, plan_demo

SEEDS = range(5)


def core_of(exchange: Exchange) -> str:
    """A question without its opening and with the product left out: what makes it a paraphrase of another."""
    asked, about = exchange.question, exchange.fact.product
    opening = max((o for o in OPENINGS if asked.startswith(o)), key=len)
    asked = asked.removeprefix(opening).strip()
    mentions = [mention.format(name=about.name, kind=about.kind) for mention in MENTIONS]
    for mention in sorted(mentions, key=len, reverse=True):
        for said in (mention, mention[0].upper() + mention[1:]):
            asked = asked.replace(said, "…")
    return asked


@pytest.mark.parametrize("seed", SEEDS)
def test_no_served_paraphrase_occurs_in_training_items(seed: int) -> None:
    """Neither a question itself nor another one that differs only in its opening or its product."""
    plan = plan_demo(DemoOptions(seed=seed))
    taught = [exchange for exchange in plan if exchange.kind == "train"]
    asked = [exchange for exchange in plan if exchange.kind != "train"]
    assert not {exchange.question for exchange in taught} & {exchange.question for exchange in asked}
    assert not {core_of(exchange) for exchange in taught} & {core_of(exchange) for exchange in asked}
    assert len({core_of(exchange) for exchange in asked}) == 18


def test_a_plan_is_a_function_of_its_options() -> None:
    """The same seed plans the same; another one other facts, questions and times."""
    assert plan_demo(DemoOptions()) == plan_demo(DemoOptions())
    plans = [plan_demo(DemoOptions(seed=seed)) for seed in SEEDS]
    assert len({tuple(exchange.question for exchange in plan) for plan in plans}) == len(plans)
    assert all(plan == sorted(plan, key=lambda exchange: exchange.at_s) for plan in plans)


def test_without_training_the_questions_are_the_same() -> None:
    """So that the two runs can be compared."""
    plan, quiet = plan_demo(DemoOptions()), plan_demo(DemoOptions(has_training=False))
    assert quiet == [exchange for exchange in plan if exchange.kind != "train"]


@pytest.mark.parametrize("seed", SEEDS)
def test_corrections_are_news(seed: int) -> None:
    """What has changed has a value that the catalogue doesn't say; the rest is as the catalogue says."""
    catalogue, options = make_catalogue(), DemoOptions(seed=seed)
    changed, unchanged = change_facts(catalogue, options)
    assert len(changed) == options.changed_facts
    assert len(changed) + len(unchanged) == len(list(catalogue.facts()))
    assert all(fact.value != catalogue.fact(fact.product, fact.attribute).value for fact in changed)
    assert set(unchanged) < set(catalogue.facts())


def test_every_fact_that_changed_is_taught_as_often() -> None:
    """In another phrasing each time, after the first tenth of the run and before its last quarter."""
    options = DemoOptions()
    lessons = [exchange for exchange in plan_demo(options) if exchange.kind == "train"]
    assert set(Counter(lesson.fact for lesson in lessons).values()) == {options.examples_per_fact}
    assert len({lesson.question for lesson in lessons}) == len(lessons)
    assert 0.1 * options.duration_s <= lessons[0].at_s <= lessons[-1].at_s <= 0.75 * options.duration_s


@pytest.mark.parametrize("seed", SEEDS)
def test_all_parts_of_a_run_are_alike(seed: int) -> None:
    """Each fifth of the generations asks as often, to one, for facts that nobody corrects."""
    asked = [exchange for exchange in plan_demo(DemoOptions(seed=seed)) if exchange.kind == "generate"]
    fifth = math.ceil(len(asked) / 5)
    controls = [
        sum(not exchange.has_changed for exchange in asked[at : at + fifth])
        for at in range(0, len(asked), fifth)
    ]
    assert max(controls) - min(controls) <= 1
    assert max(controls) / fifth < 0.15


def test_arrivals_are_what_clients_submit() -> None:
    """Right answers end with the end of the sequence; generations end where the model ends them."""
    folder = open_model_folder(str(MODEL), stages=3)
    card = ModelCard.parse({name: str(value) for name, value in folder.fields().items()})
    exchanges = plan_demo(replace(DemoOptions(), duration_s=10.0))
    arrivals = demo_arrivals(exchanges, open_tokenization(card, folder.tokenizer))
    items = [arrival.item("demo") for arrival in arrivals]
    assert {type(item) for item in items} == {GenerateItem, ScoreItem, TrainItem}
    for arrival, item in zip(arrivals, items, strict=True):
        assert arrival.reference[-1:] == folder.eos_token_ids
        if isinstance(item, GenerateItem):
            assert not item.ignore_eos
            assert len(arrival.reference) < item.max_new_tokens


def test_the_cluster_is_what_the_demo_promises() -> None:
    """Two nodes of three stages, of the shipped model, which stays under 8 MB."""
    settings = demo_settings(DemoOptions(seed=7), "separate")
    assert (settings.nodes, settings.stages, settings.policy, settings.seed) == (2, 3, "separate", 7)
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8e6
