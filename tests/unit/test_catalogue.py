from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import Tokenizer

from lemix_studies.catalogue import (
    ATTRIBUTES,
    COLOUR,
    MENTIONS,
    OPENINGS,
    Attribute,
    Fact,
    Phrasing,
    Product,
    make_catalogue,
    phrasings,
)
from lemix_studies.demo import MODEL

LAMP = Product("Tavola", "lamp")
KNOWN = make_catalogue().products[0]


def test_a_question_and_its_answer_are_sentences() -> None:
    """As a client would write them."""
    asked = Phrasing("Hello.", "which colour is {}?", "the {name} {kind}").question(LAMP)
    assert (asked, Fact(LAMP, COLOUR, "green").answer()) == (
        "Hello. Which colour is the Tavola lamp?",
        "The Tavola lamp is green.",
    )


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_what_is_asked_is_not_what_is_taught(attribute: Attribute) -> None:
    """No core is in both halves, and no two phrasings make the same question."""
    assert not set(attribute.taught) & set(attribute.asked)
    questions = [phrasing.question(LAMP) for phrasing in phrasings(attribute.cores)]
    assert len(set(questions)) == len(questions) == len(OPENINGS) * len(attribute.cores) * len(MENTIONS)


def test_a_catalogue_is_a_function_of_its_seed() -> None:
    """Seeds differ in the facts and agree in the names, so one vocabulary serves all."""
    first, second = make_catalogue(0), make_catalogue(1)
    assert make_catalogue.__wrapped__(0) == first
    assert first.products == second.products
    assert first.values != second.values
    names = [product.name for product in first.products]
    assert len(set(names)) == len(names)
    assert all(fact.value in fact.attribute.values for fact in first.facts())


def test_the_shipped_tokenizer_has_every_word() -> None:
    """Each name, question and answer comes back from its tokens as it was."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    catalogue = make_catalogue()
    texts = [fact.answer() for fact in catalogue.facts()]
    texts += [phrasing.question(KNOWN) for a in ATTRIBUTES for phrasing in phrasings(a.cores)]
    texts += [Fact(KNOWN, a, value).answer() for a in ATTRIBUTES for value in a.values]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_kinds_are_spread_evenly() -> None:
    """Neighbours differ, and no kind has more than its share."""
    kinds = [product.kind for product in make_catalogue().products]
    assert all(one != other for one, other in pairwise(kinds))
    assert {kinds.count(kind) for kind in kinds} == {12}
