"""Many requests in one row, each with its past in blocks: the whole model's logits for each."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from devices import DEVICE, DTYPE, within
from lemix_common.errors import ModelError
from lemix_common.sampling import GREEDY
from lemix_stage_worker.kv_blocks import BLOCK_TOKENS, num_blocks_for
from lemix_stage_worker.model.compiled_attention import can_attend
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.paged_attention import (
    AttendsTokens,
    KeyValueCache,
    StaleBlock,
    num_kv_blocks,
)
from lemix_stage_worker.model.paged_row import PagedRow
from lemix_stage_worker.model.sampling import Chooser, choose_tokens
from lemix_stage_worker.model.self_check import build_stages, relative_difference, run_stages_paged
from lemix_stage_worker.model.source import open_model
from numerics.subjects import REAL_MODELS, TRAINED, Subject

NUM_BLOCKS = 16
VERSION = "0.3"


@dataclass
class Tables:
    """Block tables of sequences, in a row or scattered over the cache."""

    is_scattered: bool
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def row(self, sequence: int, start: int, length: int) -> PagedRow:
        """Some tokens of a sequence."""
        if sequence not in self.tables:
            taken = {block for table in self.tables.values() for block in table}
            free = [block for block in range(NUM_BLOCKS) if block not in taken]
            if self.is_scattered:
                random.Random(sequence).shuffle(free)
            self.tables[sequence] = tuple(free[: num_blocks_for(64)])
        return PagedRow(
            start=start, length=length, blocks=self.tables[sequence][: num_blocks_for(start + length)]
        )


@pytest.mark.parametrize("attends_tokens", ["one by one", "in place", "copied"])
@pytest.mark.parametrize("is_scattered", [False, True], ids=["in a row", "scattered"])
@pytest.mark.parametrize("num_stages", [1, 2, 5])
@torch.no_grad()
def test_each_request_of_a_row_gets_the_whole_models_logits(
    subject: Subject, num_stages: int, *, is_scattered: bool, attends_tokens: AttendsTokens
) -> None:
    """Prefill chunks and decodes of two requests in the same iterations, at different places of their sequences."""
    stages = list(build_stages(subject.source, cut_model(subject.source, num_stages)))
    caches = [KeyValueCache.of(stage, NUM_BLOCKS) for stage in stages]
    if attends_tokens == "in place" and not can_attend(caches[0].keys_GSK[0]):
        pytest.skip("the kernel is one for processors and float32")
    for cache in caches:
        cache.attends_tokens = attends_tokens
    tables = Tables(is_scattered)
    # (sequence, from, to) of each iteration's rows
    iterations = [
        [(0, 0, 7)],
        [(1, 0, 20), (0, 7, 8)],
        [(0, 8, 20)],
        [(1, 20, 21), (0, 20, 21)],
        [(0, 21, 24), (1, 21, 24)],
    ]
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for parts in iterations:
        rows = [tables.row(sequence, start, end - start) for sequence, start, end in parts]
        ids = [subject.ids[sequence, start:end] for sequence, start, end in parts]
        logits_TV = run_stages_paged(stages, caches, torch.cat(ids), rows, VERSION)
        for (sequence, _, _), logits in zip(
            parts, torch.split_with_sizes(logits_TV, [row.length for row in rows]), strict=True
        ):
            found[sequence].append(logits)
    expected = subject.whole(subject.ids).logits
    for sequence, parts_TV in found.items():
        assert relative_difference(torch.cat(parts_TV), expected[sequence]) < within(1e-5)


@pytest.mark.data
@torch.no_grad()
def test_the_trained_llama_tells_its_story() -> None:
    """Greedy text from the beginning-of-sequence token, through three stages, is the known one."""
    folder = REAL_MODELS / TRAINED[0]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    source = open_model(folder, dtype=DTYPE, device=DEVICE)
    stages = build_stages(source, cut_model(source, 3))
    caches = [KeyValueCache.of(stage, NUM_BLOCKS) for stage in stages]
    tables, tokens = Tables(is_scattered=False), [1]
    for position in range(24):
        ids_T = torch.tensor(tokens[-1:], device=DEVICE)
        logits_TV = run_stages_paged(stages, caches, ids_T, [tables.row(0, position, 1)], VERSION)
        (choice,) = choose_tokens(logits_TV, [Chooser(GREEDY, 1)], [position + 1])
        tokens.append(choice.token)
    vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = {token: word for word, token in vocabulary.items()}
    text = "".join(words[token] for token in tokens[1:]).replace("\u2581", " ").strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@torch.no_grad()
def test_a_block_of_other_weights_cannot_be_read(subject: Subject) -> None:
    """Keys that one version wrote are refused to a forward pass of another, before anything is computed."""
    (stage,) = build_stages(subject.source, cut_model(subject.source, 1))
    cache = KeyValueCache.of(stage, NUM_BLOCKS)
    blocks = (2, 3)
    cache.plan([PagedRow(start=0, length=BLOCK_TOKENS, blocks=blocks[:1])], "0.1")
    with pytest.raises(StaleBlock):
        cache.plan([PagedRow(start=BLOCK_TOKENS, length=1, blocks=blocks)], "0.2")


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_cache_keeps_within_its_bytes(subject: Subject, num_stages: int) -> None:
    """On every stage: as many blocks as the largest one may hold, or as requests may fill; one context must fit."""
    layers, of_context = cut_model(subject.source, num_stages), num_blocks_for(subject.source.context_length)
    stages = build_stages(subject.source, layers)
    one = KeyValueCache.of(max(stages, key=lambda stage: len(stage.cut.layers)), of_context)
    context_bytes = sum(tensor.nbytes for tensor in (*one.keys_GSK, *one.values_GSK))

    def blocks(kv_bytes: int) -> int:
        return num_kv_blocks(subject.source, layers, max_running=4, kv_bytes=kv_bytes)

    for kv_bytes in (context_bytes, context_bytes * 5 // 2):
        for stage in stages:
            cache = KeyValueCache.of(stage, blocks(kv_bytes))
            assert sum(tensor.nbytes for tensor in (*cache.keys_GSK, *cache.values_GSK)) <= kv_bytes
    assert (blocks(context_bytes), blocks(context_bytes * 100)) == (of_context, 4 * of_context)
    with pytest.raises(ModelError, match="allow for more, or use more stages"):
        blocks(context_bytes - 1)
