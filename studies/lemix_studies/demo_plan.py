"""What the demo's clients submit and when: a pure function of its options.

Some facts of the catalogue have changed, which the shipped model can't know. Corrections arrive as training examples,
several for each fact, all in taught phrasings. Meanwhile clients ask, all in other phrasings, mostly for the facts that
changed: an answer is right if it says the new value to the letter. Some questions are for facts that nobody corrects,
to see whether learning leaves them alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle

from lemix.items import GenerateItem, Item
from lemix.tokenization import Tokenization
from lemix_studies.catalogue import Catalogue, Fact, make_catalogue, phrasings
from lemix_studies.workload import Kind, PlannedArrival

ANSWER_TOKENS = 16
"""Where an answer is cut off that doesn't end by itself; a right one has 7 to 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The size of a demo. Its proportions are such that a first fifth has hardly learned and a last one has."""

    seed: int = 0
    has_training: bool = True
    duration_s: float = 60.0
    """Of the questions; corrections arrive from a tenth of it on, and are all there after three quarters."""
    questions_per_second: float = 5.0
    changed_facts: int = 24
    examples_per_fact: int = 10
    score_every: int = 4
    """Each so many-th question asks how likely the right answer is, instead of for an answer."""
    unchanged_every: int = 12
    """Each so many-th question is for a fact that nobody corrects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Something that is asked or taught, in words."""

    at_s: float
    kind: Kind
    question: str
    fact: Fact
    """As it should be answered."""
    has_changed: bool


def plan_demo(options: DemoOptions) -> list[Exchange]:
    """All questions and corrections, in the order of their times."""
    catalogue = make_catalogue()
    changed, unchanged = change_facts(catalogue, options)
    asked = _questions(changed, unchanged, options)
    taught = _lessons(changed, options) if options.has_training else iter(())
    return sorted(chain(asked, taught), key=lambda exchange: exchange.at_s)


def change_facts(catalogue: Catalogue, options: DemoOptions) -> tuple[list[Fact], list[Fact]]:
    """Some facts with new values, and all others as they are."""
    drawn = random.Random(f"changes:{options.seed}")
    facts = list(catalogue.facts())
    drawn.shuffle(facts)
    old, unchanged = facts[: options.changed_facts], facts[options.changed_facts :]
    changed = [
        replace(fact, value=drawn.choice([value for value in fact.attribute.values if value != fact.value]))
        for fact in old
    ]
    return changed, unchanged


def _questions(
    changed: Sequence[Fact], unchanged: Sequence[Fact], options: DemoOptions
) -> Iterator[Exchange]:
    """A Poisson stream; which questions are of which sort is regular, so that all parts of a run are alike."""
    drawn = random.Random(f"questions:{options.seed}")
    asked, others, at_s = _shuffled_rounds(changed, drawn), _shuffled_rounds(unchanged, drawn), 0.0
    for number in range(round(options.duration_s * options.questions_per_second)):
        at_s += drawn.expovariate(options.questions_per_second)
        has_changed = number % options.unchanged_every != options.unchanged_every // 2
        fact = next(asked if has_changed else others)
        yield Exchange(
            at_s=at_s,
            kind="score" if number % options.score_every == options.score_every - 1 else "generate",
            question=drawn.choice(phrasings(fact.attribute.asked)).question(fact.product),
            fact=fact,
            has_changed=has_changed,
        )


def _lessons(changed: Sequence[Fact], options: DemoOptions) -> Iterator[Exchange]:
    """Each fact once a round, in another phrasing each time, at random moments of the lessons' time."""
    drawn = random.Random(f"lessons:{options.seed}")
    rounds = _shuffled_rounds(changed, drawn)
    number = options.examples_per_fact * len(changed)
    times = sorted(drawn.uniform(0.1, 0.75) * options.duration_s for _ in range(number))
    ways = {
        fact: cycle(drawn.sample(options_of, len(options_of)))
        for fact in changed
        for options_of in [phrasings(fact.attribute.taught)]
    }
    for at_s, fact in zip(times, rounds, strict=False):
        question = next(ways[fact]).question(fact.product)
        yield Exchange(at_s=at_s, kind="train", question=question, fact=fact, has_changed=True)


def _shuffled_rounds(facts: Sequence[Fact], drawn: random.Random) -> Iterator[Fact]:
    """All facts in a new order each round, for ever."""
    while True:
        yield from drawn.sample(facts, len(facts))


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoArrival(PlannedArrival):
    """An exchange in tokens. A generation ends where the model ends it."""

    exchange: Exchange

    def item(self, prefix: str) -> Item:
        """As it is submitted."""
        if self.kind != "generate":
            return PlannedArrival.item(self, prefix)
        return GenerateItem(self.prompt, ANSWER_TOKENS, item_id=f"{prefix}-{self.line:06d}")


def demo_arrivals(exchanges: Sequence[Exchange], tokenization: Tokenization) -> list[DemoArrival]:
    """The exchanges as a replay submits them; a right answer ends with the end-of-sequence token."""
    end = tokenization.card.eos_token_ids[:1]
    return [
        DemoArrival(
            line=line,
            at_s=exchange.at_s,
            kind=exchange.kind,
            prompt=tokenization.prompt_ids(exchange.question),
            reference=tokenization.reference_ids(exchange.fact.answer()) + end,
            is_capped=False,
            exchange=exchange,
        )
        for line, exchange in enumerate(exchanges)
    ]
