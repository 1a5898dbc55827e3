"""Stages with a key-value cache: prefill, chunks, decode."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from devices import DEVICE, DTYPE, arange
from lemix_common.sampling import GREEDY
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.sampling import Chooser, choose_tokens
from lemix_stage_worker.model.self_check import build_stages, run_stages
from lemix_stage_worker.model.source import open_model
from numerics.subjects import REAL_MODELS, TRAINED, Subject

CHUNKINGS = {
    "prefill, then decode": (0, 20, 21, 22, 23, 24),
    "chunked prefill": (0, 7, 8, 16, 24),
    "token by token": range(25),
}


@pytest.mark.parametrize("borders", CHUNKINGS.values(), ids=CHUNKINGS.keys())
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@torch.no_grad()
def test_cached_logits_are_the_whole_models_bit_for_bit(
    subject: Subject, num_stages: int, borders: tuple[int, ...]
) -> None:
    """In whatever pieces a sequence arrives, each piece gives the bits of the whole model with its cache."""
    stages = build_stages(subject.source, cut_model(subject.source, num_stages))
    caches = [stage.new_cache() for stage in stages]
    whole_cache = DynamicCache(config=subject.whole.config)
    for start, stop in pairwise(borders):
        ids = subject.ids[:, start:stop]
        expected = subject.whole(ids, past_key_values=whole_cache, use_cache=True).logits
        assert torch.equal(run_stages(stages, ids, arange(start, stop), caches), expected), start


@torch.no_grad()
def test_a_stages_cache_has_its_own_layers_only(subject: Subject) -> None:
    """A stage caches keys and values for the layers that it runs, no more."""
    for stage in build_stages(subject.source, cut_model(subject.source, 2)):
        assert len(stage.new_cache().layers) == len(stage.cut.layers)


@torch.no_grad()
def test_requests_with_caches_of_their_own_do_not_disturb_each_other(subject: Subject) -> None:
    """Two requests decoded in turns get what each gets alone."""
    stages = build_stages(subject.source, cut_model(subject.source, 2))

    def decode(turns: list[int]) -> list[torch.Tensor]:
        caches = [[stage.new_cache() for stage in stages] for _ in range(2)]
        place = [0, 0]
        found: list[list[torch.Tensor]] = [[], []]
        for row in turns:
            ids = subject.ids[row : row + 1, place[row] : place[row] + 4]
            positions = arange(place[row], place[row] + 4)
            found[row].append(run_stages(stages, ids, positions, caches[row]))
            place[row] += 4
        return [torch.cat(pieces, dim=1) for pieces in found]

    for alone, in_turns in zip(decode([0] * 5 + [1] * 5), decode([0, 1] * 5), strict=True):
        assert torch.equal(alone, in_turns)


@pytest.mark.data
@torch.no_grad()
def test_the_trained_llama_tells_its_story() -> None:
    """Greedy text from the beginning-of-sequence token, through three stages, is the known one."""
    folder = REAL_MODELS / TRAINED[0]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    source = open_model(folder, dtype=DTYPE, device=DEVICE)
    stages = build_stages(source, cut_model(source, 3))
    caches = [stage.new_cache() for stage in stages]
    tokens = [1]
    for position in range(24):
        logits_V = run_stages(
            stages,
            torch.tensor([tokens[-1:]], device=DEVICE),
            torch.tensor([position], device=DEVICE),
            caches,
        )[0, -1]
        (choice,) = choose_tokens(logits_V[None], [Chooser(GREEDY, 1)], [position + 1])
        tokens.append(choice.token)
    vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = {token: word for word, token in vocabulary.items()}
    text = "".join(words[token] for token in tokens[1:]).replace("\u2581", " ").strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
