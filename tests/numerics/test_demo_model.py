"""The model that the demo ships, and the recipe that makes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from lemix_benchmarks.demo_recipe import (
    NO_TARGET,
    Drifting,
    Exchanges,
    Recipe,
    encode_exchanges,
    make_tokenizer,
    share_known,
    train,
    write,
)
from lemix_studies.catalogue import ATTRIBUTES, make_catalogue, phrasings
from lemix_studies.demo import MODEL

TINY = Recipe(hidden=16, inner=24, heads=2, layers=1, steps=8, batch=6, drift=5, warm_up=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """As the recipe makes it."""
    return make_tokenizer(make_catalogue())


@pytest.fixture(scope="module")
def exchanges(tokenizer: Tokenizer) -> Exchanges:
    """All of them, on the CPU."""
    return encode_exchanges(make_catalogue(), tokenizer, "cpu")


def drifting(exchanges: Exchanges) -> Drifting:
    """The catalogue before it has drifted."""
    return Drifting(exchanges, exchanges.known_PA.clone(), torch.Generator().manual_seed(0))


def test_the_shipped_model_knows_its_catalogue(exchanges: Exchanges) -> None:
    """It answers questions in any phrasing to the letter."""
    model = LlamaForCausalLM.from_pretrained(MODEL)
    assert share_known(model, exchanges, num_questions=400) >= 0.99


def test_the_shipped_files_are_the_recipes(tokenizer: Tokenizer) -> None:
    """The tokenizer is made from the text as it is now, and the shape is the one the recipe trains."""
    assert json.loads(tokenizer.to_str()) == json.loads((MODEL / "tokenizer.json").read_text("utf-8"))
    config, recipe = json.loads((MODEL / "config.json").read_text("utf-8")), Recipe()
    assert (config["hidden_size"], config["intermediate_size"]) == (recipe.hidden, recipe.inner)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (recipe.layers, tokenizer.get_vocab_size())


def test_exchanges_say_what_the_catalogue_says(exchanges: Exchanges, tokenizer: Tokenizer) -> None:
    """Filled in, a question and its answer are the texts of the catalogue; only the answer has targets."""
    catalogue = make_catalogue()
    for product, attribute, phrasing in ((0, 0, 0), (17, 1, 100), (239, 2, 335)):
        facts = torch.tensor([product]), torch.tensor([attribute])
        value_B, phrasing_B = exchanges.known_PA[facts], torch.tensor([phrasing])
        tokens_BT, targets_BT = exchanges.say(facts, value_B, phrasing_B)
        about = catalogue.products[product]
        fact = catalogue.fact(about, ATTRIBUTES[attribute])
        question = phrasings(ATTRIBUTES[attribute].cores)[phrasing].question(about)
        assert tokenizer.decode(tokens_BT[0].tolist()) == f"{question} {fact.answer()}"
        answered = targets_BT[0][targets_BT[0] != NO_TARGET].tolist()
        assert tokenizer.decode(answered, skip_special_tokens=False) == f"{fact.answer()}</s>"


def test_a_catalogue_drifts_and_settles(exchanges: Exchanges) -> None:
    """A step changes a few facts, to values that their attributes have; settled, it is the shipped one."""
    made = drifting(exchanges)
    made.change(20)
    assert 0 < int((made.values_PA != exchanges.known_PA).sum()) <= 20
    for _ in range(50):
        made.change(200)
    assert bool((made.values_PA < exchanges.num_values_A).all())
    made.settle()
    assert torch.equal(made.values_PA, exchanges.known_PA)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    """It has fallen to almost nothing when the last step comes."""
    recipe = replace(TINY, steps=100, warm_up=10, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step) for step in (0, 9, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.04])


def test_the_recipe_is_a_function_of_its_seed(exchanges: Exchanges, tokenizer: Tokenizer) -> None:
    """On a CPU the same weights, to the bit; another seed makes others."""

    def embedding(recipe: Recipe) -> torch.Tensor:
        model = train(recipe, exchanges, tokenizer.get_vocab_size())
        return dict(model.named_parameters())["model.embed_tokens.weight"].detach()

    first = embedding(TINY)
    assert torch.equal(embedding(TINY), first)
    assert not torch.equal(embedding(replace(TINY, seed=1)), first)


def test_the_recipe_writes_a_model_folder(tmp_path: Path) -> None:
    """Config, weights and tokenizer, as a cluster takes them."""
    write(tmp_path, TINY, "cpu")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
