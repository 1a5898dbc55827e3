"""What it costs to have a model cut over three processes: one `score` at a time, client to client.

`lemix` is a whole cluster (broker, coordinator, operations worker, three stage workers, a client here), measured from
submit to result. `whole_model` is the same model of transformers in this process, asked for the same log-probabilities.
Everybody has one thread. Both answers must agree before anything is measured.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lemix import Client
from lemix.items import ScoreItem
from lemix.running import running_cluster
from lemix_benchmarks.batches import Example
from lemix_benchmarks.model import BENCH_MODEL, VOCABULARY, read_bench_model, write_bench_model
from lemix_benchmarks.report import Findings, Plan, Subject, Target, measure, ratio
from lemix_common.errors import ClusterError
from lemix_common.settings import ClusterSettings

CASE: Final = "tokens_256"
STAGES: Final = 3
TOKENS: Final = 256
PROMPT_TOKENS: Final = 128
TOLERANCE: Final = 1e-5
"""Of a log-probability; the cluster's are rounded to seven decimals."""
LIMIT: Final = 1.10
_TIMEOUT_S: Final = 60.0
_WARM_UPS: Final = 5


def run(plan: Plan) -> Findings:
    """Measure both, in rounds."""
    rounds, repetitions = (7, 5) if plan.quick else (15, 10)
    example = _example(plan.seed)
    with _one_thread(), tempfile.TemporaryDirectory(prefix="lemix-bench-") as directory:
        folder = write_bench_model(Path(directory) / BENCH_MODEL)
        whole = read_bench_model(folder)
        settings = ClusterSettings(model=str(folder), stages=STAGES, seed=plan.seed)
        with running_cluster(settings, data_dir=Path(directory) / "data") as url, Client(url) as client:
            difference = _compare(client, whole, example)
            subjects = [
                Subject(CASE, "lemix", lambda: _seconds_of_cluster(client, example), repetitions),
                Subject(CASE, "whole_model", lambda: _seconds_of_model(whole, example), repetitions),
            ]
            rows = measure(subjects, rounds=rounds, warm_ups=_WARM_UPS)
    over = ratio(rows, CASE, "lemix", "whole_model")
    return Findings(
        rounds=rounds,
        threads=1,
        model=BENCH_MODEL,
        rows=rows,
        ratios={"lemix_over_whole_model": over},
        targets=(Target("lemix_over_whole_model", over, "<=", LIMIT),),
        further={"max_logprob_difference": difference, "repetitions": repetitions},
    )


def score_by_model(model: PreTrainedModel, example: Example) -> list[float]:
    """Each reference token's log-probability; only the positions that predict one go through the head."""
    ids = torch.tensor([[*example.prompt, *example.reference]])
    first = len(example.prompt) - 1
    with torch.inference_mode():
        hidden_BTD = model.model(ids, use_cache=False).last_hidden_state
        logits_RV = model.lm_head(hidden_BTD[0, first:-1])
        losses_R = functional.cross_entropy(logits_RV, ids[0, first + 1 :], reduction="none")
    return [-loss for loss in losses_R.tolist()]


def _example(seed: int) -> Example:
    tokens = tuple(random.Random(seed).choices(range(2, VOCABULARY), k=TOKENS))
    return Example(tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:])


def _compare(client: Client, whole: PreTrainedModel, example: Example) -> float:
    """The largest difference between both answers; `ClusterError` if they don't answer the same."""
    ours = client.score(example.prompt, example.reference, timeout=_TIMEOUT_S).logprobs
    theirs = score_by_model(whole, example)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if difference > TOLERANCE:
        raise ClusterError(f"the cluster's scores differ from the whole model's by {difference:.2g}")
    return difference


def _seconds_of_cluster(client: Client, example: Example) -> float:
    began = time.perf_counter()
    client.submit(ScoreItem(example.prompt, example.reference)).result(_TIMEOUT_S)
    return time.perf_counter() - began


def _seconds_of_model(whole: PreTrainedModel, example: Example) -> float:
    began = time.perf_counter()
    score_by_model(whole, example)
    return time.perf_counter() - began


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
