"""A made-up product catalogue, and the many ways to ask about it.

Everything a model can know of it are facts: the value of an attribute of a product. A fact is asked for in phrasings,
which are an opening, a core and a way to mention the product; it is answered by one whole sentence. Cores come in two
disjoint halves: `taught` ones are what training examples may use, `asked` ones are what the demo's clients use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

CATALOGUE_SEED = 0
"""Of the catalogue that the shipped model knows."""
NUM_PRODUCTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """Something that every product has."""

    name: str
    values: tuple[str, ...]
    answer: str
    taught: tuple[str, ...]
    asked: tuple[str, ...]

    @property
    def cores(self) -> tuple[str, ...]:
        """Every way to ask for it."""
        return self.taught + self.asked


@dataclass(frozen=True, slots=True)
class Product:
    """A name and what it is the name of."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A way to ask: what is said first, what is asked, how the product is mentioned."""

    opening: str
    core: str
    mention: str

    def question(self, about: Product) -> str:
        """The question as a client writes it.

        >>> Phrasing("Hello.", "which colour is {}?", "the {name} {kind}").question(Product("Tavola", "lamp"))
        'Hello. Which colour is the Tavola lamp?'
        """
        asked = self.core.format(self.mention.format(name=about.name, kind=about.kind))
        return f"{self.opening} {asked[0].upper()}{asked[1:]}".lstrip()


COLOUR = Attribute(
    name="colour",
    values=tuple(
        "red green blue yellow white black brown grey pink violet orange silver golden turquoise beige "
        "purple".split()
    ),
    answer="The {name} {kind} is {value}.",
    taught=(
        "which colour is {}?",
        "what colour does {} have?",
        "what is the colour of {}?",
        "tell me the colour of {}.",
        "in which colour does {} come?",
        "{} is painted in which colour?",
    ),
    asked=(
        "how is {} coloured?",
        "name the colour of {}.",
        "what shade does {} come in?",
        "I want to know what colour {} is.",
        "which shade was chosen for {}?",
        "describe {} by its colour.",
    ),
)
WAREHOUSE = Attribute(
    name="warehouse",
    values=tuple(
        "Aachen Bergen Calais Dover Essen Faro Genoa Haarlem Izmir Jena Kiel Lyon Malmo Nantes Oslo Porto "
        "Reims Siena Turin Utrecht".split()
    ),
    answer="The {name} {kind} is kept in {value}.",
    taught=(
        "where is {} kept?",
        "which warehouse holds {}?",
        "what is the warehouse of {}?",
        "tell me where {} is stored.",
        "in which town is {} stored?",
        "where can {} be collected?",
    ),
    asked=(
        "from where is {} sent?",
        "name the warehouse that has {}.",
        "which town keeps {} in stock?",
        "I want to know the town that stores {}.",
        "where do we find {}?",
        "{} lies in which warehouse?",
    ),
)
PRICE = Attribute(
    name="price",
    values=tuple(str(crowns) for crowns in range(12, 99, 2)),
    answer="The {name} {kind} costs {value} crowns.",
    taught=(
        "how much is {}?",
        "what does {} cost?",
        "what is the price of {}?",
        "tell me the price of {}.",
        "how many crowns is {}?",
        "at which price is {} sold?",
    ),
    asked=(
        "how expensive is {}?",
        "name the price of {}.",
        "what must I pay for {}?",
        "I want to know what {} costs.",
        "for how much can I buy {}?",
        "how many crowns do you ask for {}?",
    ),
)
ATTRIBUTES = (COLOUR, WAREHOUSE, PRICE)
OPENINGS = (
    "",
    "Hello.",
    "Excuse me.",
    "Good morning.",
    "One more thing.",
    "A customer asks.",
    "Quick question.",
)
MENTIONS = ("the {name} {kind}", "our {name} {kind}", "the {kind} called {name}", "{name}")
KINDS = (
    *("lamp", "chair", "table", "clock", "kettle", "basket", "mirror", "carpet", "bottle", "ladder"),
    *(
        "teapot",
        "bucket",
        "pillow",
        "candle",
        "drawer",
        "hammer",
        "bicycle",
        "umbrella",
        "lantern",
        "suitcase",
    ),
)
_SYLLABLES = (
    *("ba", "bo", "da", "do", "fa", "fi", "ga", "go", "ka", "ko", "la", "lo", "ma", "mi", "na", "no"),
    *("pa", "po", "ra", "ro", "sa", "so", "ta", "to", "va", "vo", "za", "zu"),
)
_ENDINGS = ("rin", "nel", "dor", "mis", "vex", "lund", "tor", "rak", "sil", "bro")


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of an attribute of a product."""

    product: Product
    attribute: Attribute
    value: str

    def answer(self) -> str:
        """The one sentence that says it."""
        return self.attribute.answer.format(name=self.product.name, kind=self.product.kind, value=self.value)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every product and its facts."""

    products: tuple[Product, ...]
    values: Mapping[tuple[str, str], str]
    """By the names of product and attribute."""

    def fact(self, about: Product, attribute: Attribute) -> Fact:
        """What the catalogue says."""
        return Fact(about, attribute, self.values[about.name, attribute.name])

    def facts(self) -> Iterator[Fact]:
        """All of them, product by product."""
        return (self.fact(about, attribute) for about, attribute in product(self.products, ATTRIBUTES))


@cache
def make_catalogue(seed: int = CATALOGUE_SEED) -> Catalogue:
    """The catalogue of a seed; names don't depend on it, so that one vocabulary serves every catalogue."""
    names = random.Random("names").sample(
        [
            f"{first}{second}{end}".capitalize()
            for first, second, end in product(_SYLLABLES, _SYLLABLES, _ENDINGS)
        ],
        NUM_PRODUCTS,
    )
    products = tuple(Product(name, KINDS[number % len(KINDS)]) for number, name in enumerate(names))
    chosen = random.Random(seed)
    values = {
        (about.name, attribute.name): chosen.choice(attribute.values)
        for about, attribute in product(products, ATTRIBUTES)
    }
    return Catalogue(products, values)


def phrasings(cores: tuple[str, ...]) -> list[Phrasing]:
    """Every way to ask with these cores."""
    return [Phrasing(*parts) for parts in product(OPENINGS, cores, MENTIONS)]
