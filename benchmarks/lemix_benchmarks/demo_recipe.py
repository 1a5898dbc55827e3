"""How the model that `lemix demo` ships was made: ``python -m lemix_benchmarks.demo_recipe OUT --seed 0``.

A small Llama learns to answer questions about the made-up catalogue of `lemix_studies.catalogue`. What it must be good
at is not the catalogue but changes of it: a few training examples of a new fact, in some phrasings, must change the
answers in all phrasings and leave the other facts alone. So the catalogue drifts while the model is trained: with each
step some facts get new values. What lasts is how to look a product up; what a product is like stays easy to rewrite
(trained on one fixed catalogue, the same model forgets most of it at the first step of a correction). In the last
quarter of the steps the catalogue stands still, at the values that the demo corrects.

It takes 72 s on one H100, where sums are added in no fixed order: each run gives other weights that are as good.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lemix_studies.catalogue import ATTRIBUTES, Attribute, Catalogue, Fact, make_catalogue, phrasings

# Tensors: B samples of a batch, T tokens, A attributes, P products, F phrasings, V values.
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
BOS_ID, EOS_ID = 1, 2
CONTEXT = 128
_NAME, _KIND, _VALUE = -1, -2, -3
"""What stands in an exchange where a product's name, its kind and the answer's value go."""
NO_TARGET = -100
_REPORT_EVERY = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The model's shape and its training."""

    seed: int = 0
    hidden: int = 160
    inner: int = 448
    layers: int = 3
    heads: int = 5
    steps: int = 4000
    batch: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    drift: int = 15
    """Facts that change with each step."""
    settling: float = 0.25
    """Share of the steps, the last ones, in which the catalogue stands still and the learning rate falls."""
    warm_up: int = 200

    @property
    def settles_at(self) -> int:
        """The step from which on the catalogue stands still."""
        return round(self.steps * (1 - self.settling))

    def learning_rate_at(self, step: int) -> float:
        """It rises, stays, and falls to almost nothing."""
        rising = (step + 1) / self.warm_up
        falling = (self.steps - step) / (self.steps - self.settles_at)
        return self.learning_rate * min(1.0, rising, falling)


def make_tokenizer(catalogue: Catalogue) -> Tokenizer:
    """A token for each word of the catalogue, its questions and answers."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"[.?!,]"), "isolated")]
    )
    words = {word for text in _texts(catalogue) for word, _ in split.pre_tokenize_str(text)}
    vocabulary = [UNKNOWN, BOS, EOS, *sorted(words)]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    tokenizer.add_special_tokens([UNKNOWN, BOS, EOS])
    return tokenizer


def _texts(catalogue: Catalogue) -> Iterator[str]:
    """Texts with every word in them: each product, each phrasing and each value once."""
    first = catalogue.products[0]
    for product in catalogue.products:
        yield f"{product.name} {product.kind}"
    for attribute in ATTRIBUTES:
        yield from (phrasing.question(first) for phrasing in phrasings(attribute.cores))
        yield from (Fact(first, attribute, value).answer() for value in attribute.values)


@dataclass(frozen=True)
class Exchanges:
    """Every question with its answer, as tokens with gaps, and what goes into the gaps."""

    tokens_AFT: Tensor
    is_answer_AFT: Tensor
    names_P: Tensor
    kinds_P: Tensor
    values_AV: Tensor
    num_values_A: Tensor
    known_PA: Tensor
    """Number of each fact's value in the catalogue."""

    def say(self, facts: tuple[Tensor, Tensor], value_B: Tensor, phrasing_B: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and the targets of the answers: (B, T) each; ``facts`` are products and attributes, (B) each."""
        product_B, attribute_B = facts
        tokens_BT = self.tokens_AFT[attribute_B, phrasing_B]
        for gap, filling_B in (
            (_NAME, self.names_P[product_B]),
            (_KIND, self.kinds_P[product_B]),
            (_VALUE, self.values_AV[attribute_B, value_B]),
        ):
            tokens_BT = torch.where(tokens_BT == gap, filling_B[:, None], tokens_BT)
        targets_BT = tokens_BT.masked_fill(~self.is_answer_AFT[attribute_B, phrasing_B], NO_TARGET)
        return tokens_BT[:, :-1], targets_BT[:, 1:]


def encode_exchanges(catalogue: Catalogue, tokenizer: Tokenizer, device: str) -> Exchanges:
    """All exchanges about one product, with gaps where its own words stand."""
    first = catalogue.products[0]

    def word(text: str) -> int:
        (token,) = tokenizer.encode(text, add_special_tokens=False).ids
        return int(token)

    def exchange(attribute: Attribute, question: str) -> tuple[list[int], int]:
        fact = Fact(first, attribute, attribute.values[0])
        gaps = {word(first.name): _NAME, word(first.kind): _KIND, word(fact.value): _VALUE}
        asked = tokenizer.encode(question).ids
        said = [*asked, *tokenizer.encode(fact.answer(), add_special_tokens=False).ids, EOS_ID]
        return [gaps.get(token, token) for token in said], len(asked)

    said = [
        [exchange(attribute, phrasing.question(first)) for phrasing in phrasings(attribute.cores)]
        for attribute in ATTRIBUTES
    ]
    longest = max(len(tokens) for row in said for tokens, _ in row)
    most = max(len(attribute.values) for attribute in ATTRIBUTES)

    def tensor(rows: Sequence[object]) -> Tensor:
        return torch.tensor(rows, device=device)

    return Exchanges(
        tokens_AFT=tensor([[_padded(tokens, longest, EOS_ID) for tokens, _ in row] for row in said]),
        is_answer_AFT=tensor(
            [[[asked <= at < len(tokens) for at in range(longest)] for tokens, asked in row] for row in said]
        ),
        names_P=tensor([word(product.name) for product in catalogue.products]),
        kinds_P=tensor([word(product.kind) for product in catalogue.products]),
        values_AV=tensor([_padded([word(value) for value in a.values], most, 0) for a in ATTRIBUTES]),
        num_values_A=tensor([len(attribute.values) for attribute in ATTRIBUTES]),
        known_PA=tensor(
            [
                [a.values.index(catalogue.fact(product, a).value) for a in ATTRIBUTES]
                for product in catalogue.products
            ]
        ),
    )


def _padded(tokens: list[int], length: int, padding: int) -> list[int]:
    return tokens + [padding] * (length - len(tokens))


@dataclass
class Drifting:
    """The catalogue as it is at a step, and questions about it."""

    exchanges: Exchanges
    values_PA: Tensor
    drawn: torch.Generator

    def change(self, num_facts: int) -> None:
        """Give some facts new values."""
        facts = self._facts(num_facts)
        self.values_PA[facts] = self._below(self.exchanges.num_values_A[facts[1]])

    def settle(self) -> None:
        """Go back to the catalogue as it is shipped."""
        self.values_PA = self.exchanges.known_PA

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of questions about any facts, in any phrasings."""
        facts = self._facts(size)
        phrasing_B = self._below(torch.full_like(facts[0], self.exchanges.tokens_AFT.shape[1]))
        return self.exchanges.say(facts, self.values_PA[facts], phrasing_B)

    def _facts(self, number: int) -> tuple[Tensor, Tensor]:
        products, attributes = self.values_PA.shape
        every = torch.full((number,), products * attributes, device=self.values_PA.device)
        fact_B = self._below(every)
        return fact_B // attributes, fact_B % attributes

    def _below(self, limits_B: Tensor) -> Tensor:
        chances_B = torch.rand(limits_B.shape, device=limits_B.device, generator=self.drawn)
        return (chances_B * limits_B).long()


def train(recipe: Recipe, exchanges: Exchanges, vocab_size: int) -> LlamaForCausalLM:
    """Train from random weights, while the catalogue drifts and then settles."""
    device = exchanges.names_P.device
    torch.manual_seed(recipe.seed)
    with device:
        model = LlamaForCausalLM(_config(recipe, vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    drawn = torch.Generator(device).manual_seed(recipe.seed)
    drifting = Drifting(exchanges, exchanges.known_PA.clone(), drawn)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        if step < recipe.settles_at:
            drifting.change(recipe.drift)
        else:
            drifting.settle()
        loss = _loss(model, *drifting.batch(recipe.batch))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _REPORT_EVERY == 0:
            print(f"step {step} of {recipe.steps}: loss {loss.item():.4f}", flush=True)
    return model


def _config(recipe: Recipe, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        vocab_size=vocab_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="float32",
    )


def _loss(model: LlamaForCausalLM, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=tokens_BT.is_cuda):
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    loss: Tensor = functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=NO_TARGET
    )
    return loss


@torch.no_grad()
def share_known(model: LlamaForCausalLM, exchanges: Exchanges, num_questions: int = 4096) -> float:
    """Share of questions, about any facts in any phrasings, that are answered to the letter."""
    drawn = torch.Generator(exchanges.names_P.device).manual_seed(1)
    tokens_BT, targets_BT = Drifting(exchanges, exchanges.known_PA, drawn).batch(num_questions)
    said_BT = model(input_ids=tokens_BT, use_cache=False).logits.argmax(-1)
    return float(((said_BT == targets_BT) | (targets_BT == NO_TARGET)).all(1).float().mean())


def write(folder: Path, recipe: Recipe, device: str) -> None:
    """Train and write a Hugging Face folder: config, weights in float32, tokenizer."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    catalogue, begun = make_catalogue(), time.monotonic()
    tokenizer = make_tokenizer(catalogue)
    exchanges = encode_exchanges(catalogue, tokenizer, device)
    model = train(recipe, exchanges, tokenizer.get_vocab_size())
    known, seconds = share_known(model, exchanges), time.monotonic() - begun
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # which safetensors makes for its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    print(
        f"{model.num_parameters():,} parameters, {known:.2%} of the answers right, {seconds:.0f} s on {device}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train the demo's model from generated text.")
    parser.add_argument("out", type=Path, help="a folder, made if need be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    write(given.out, Recipe(seed=given.seed), given.device)


if __name__ == "__main__":
    main()
