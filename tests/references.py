"""What a cluster is compared with: plain loops over a whole transformers model, and real rows to run them on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from devices import DEVICE, DTYPE, IS_HALF, NEAR_TIE, TIED_SHARE
from lemix import TrainItem
from lemix.model_folder import open_model_folder
from lemix.preparation import prepare
from lemix.tokenization import ModelCard, Tokenization, open_tokenization
from lemix_common.errors import OverLong
from lemix_common.sampling import GREEDY, Sampling
from lemix_stage_worker.model.sampling import Chooser, scores

DATA = Path(__file__).parents[2] / "shared" / "data"
GSM8K = DATA / "text" / "gsm8k_train.jsonl"
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A training example as text (or ids) and as the ids a client makes of it."""

    prompt: str | Ids
    reference: str | Ids
    ids: tuple[Ids, Ids]


def tokenization_of(folder: Path) -> Tokenization:
    """A model folder's, as a cluster publishes it."""
    model = open_model_folder(str(folder), stages=1)
    fields = {name: str(value) for name, value in model.fields().items()}
    return open_tokenization(ModelCard.parse(fields), model.tokenizer)


def write_number_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A tokenizer whose words are the ids themselves, for a model made of nothing."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def fitting_examples(folder: Path, rows: Iterable[tuple[str, str]], count: int) -> tuple[list[Example], int]:
    """The first ``count`` rows that fit the model's context, and how many before them don't."""
    tokenization, fitting, num_over_long = tokenization_of(folder), [], 0
    for prompt, reference in rows:
        try:
            (prepared,) = prepare(TrainItem(prompt, reference), tokenization)
        except OverLong:
            num_over_long += 1
            continue
        fitting.append(
            Example(prompt, reference, (prepared.payload["prompt"], prepared.payload["reference"]))
        )
        if len(fitting) == count:
            break
    return fitting, num_over_long


def gsm8k_rows() -> Iterable[tuple[str, str]]:
    """Questions and answers in the file's order."""
    with GSM8K.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["question"], row["answer"]


def whole_model(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, dropout off."""
    disable_progress_bar: Callable[[], None] = logging.disable_progress_bar
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=DTYPE if IS_HALF else "auto"
    )
    model.train(mode=False).to(DEVICE)
    return model


def train_whole(
    folder: Path,
    examples: Sequence[Example],
    *,
    step_examples: int,
    learning_rate: float,
    weight_decay: float,
    delay: int = 0,
    dtype: torch.dtype = torch.float32,
    targets_of_step: Sequence[int] = (),
) -> dict[str, Tensor]:
    """The plain loop: one model, one process, one microbatch an example, torch's AdamW.

    With a ``delay`` of 1 each step's gradients are those of the version before the newest. A step's loss is the mean
    over its own targets, or over as many as ``targets_of_step`` says.
    """
    model = whole_model(folder).to(dtype)  # type: ignore[arg-type]  # transformers wraps it, untyped
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    kept = [_copy(model)]
    for start in range(0, len(examples), step_examples):
        newest = _copy(model)
        kept = [*kept, newest][-1 - delay :]
        _load(model, kept[0])
        step = [example.ids for example in examples[start : start + step_examples]]
        num_targets = sum(len(reference) for _, reference in step)
        if targets_of_step:
            num_targets = targets_of_step[start // step_examples]
        for prompt, reference in step:
            logits_TV = model(torch.tensor([[*prompt, *reference]], device=DEVICE)).logits[0]
            predicted = logits_TV[len(prompt) - 1 : -1]
            loss = (
                functional.cross_entropy(predicted, torch.tensor(reference, device=DEVICE), reduction="sum")
                / num_targets
            )
            torch.autograd.backward(loss)
        _load(model, newest)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def _copy(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@torch.no_grad()
def _load(model: PreTrainedModel, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """norm(found - expected) / norm(expected) over all values; GPT-2's key biases, whose gradient is zero, left out."""
    assert found.keys() == expected.keys()
    pairs = [(_counted(name, found[name]), _counted(name, expected[name])) for name in expected]
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return float((difference / norm) ** 0.5)


def _counted(name: str, values: Tensor) -> Tensor:
    if not name.endswith("attn.c_attn.bias"):
        return values
    query, _, value = values.chunk(3)
    return torch.cat([query, value])


@dataclass
class Tally:
    """Positions of many answers that were compared with the whole model's choices."""

    positions: int = 0
    differing: int = 0
    """Near ties in which the other one was chosen."""

    def compare(
        self,
        model: PreTrainedModel,
        prompt: Sequence[int],
        tokens: Sequence[int],
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Each token is the one the whole model chooses after those before it, or either of two in a near tie."""
        chosen = list(follow_whole(model, prompt, tokens, sampling, stop_ids))
        others = [at for at, (token, _) in enumerate(chosen) if token != tokens[at]]
        assert [at for at in others if chosen[at][1] >= NEAR_TIE] == []
        self.positions += len(tokens)
        self.differing += len(others)

    def check(self) -> None:
        """Near ties that went the other way are rare."""
        assert self.differing <= self.positions * TIED_SHARE


def assert_tokens_equal(
    model: PreTrainedModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
) -> None:
    """Each token is the one the whole model chooses after those before it (either of two in a near tie, but rarely)."""
    tally = Tally()
    tally.compare(model, prompt, tokens, sampling, stop_ids)
    tally.check()


@torch.no_grad()
def follow_whole(
    model: PreTrainedModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
) -> Iterator[tuple[int, float]]:
    """What the whole model, with its own key-value cache, chooses at each position, and by what margin."""
    ids, cache = list(prompt), None
    chooser = Chooser(sampling, len(prompt), tuple(stop_ids))
    chooser.note(0, [*prompt, *tokens])
    for index, token in enumerate(tokens):
        output = model(torch.tensor([ids], device=DEVICE), past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, [token]
        best = scores(output.logits[0, -1], chooser, len(prompt) + index).topk(2)
        yield int(best.indices[0]), float(best.values[0] - best.values[1])


@torch.no_grad()
def score_whole(model: PreTrainedModel, prompt: Sequence[int], reference: Sequence[int]) -> list[float]:
    """The log-probability of each reference token."""
    logits_TV = model(torch.tensor([[*prompt, *reference]], device=DEVICE)).logits[0, len(prompt) - 1 : -1]
    values: list[float] = (
        -functional.cross_entropy(logits_TV.float(), torch.tensor(reference, device=DEVICE), reduction="none")
    ).tolist()
    return values


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """As INTERFACES defines it: over parameters in name order, raw bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
