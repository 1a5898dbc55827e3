"""Generation's speed: a cluster of two stages beside other programs on the same two cores, all with the same weights.

A case is a number of requests that are kept running: a new one as soon as one has its last token. Prompts have 16 to
128 random tokens, answers 32 to 128, all chosen greedily and none ended early; a round's list is the same for everyone.

===================  ===================================================================================================
subject
===================  ===================================================================================================
lemix                a whole cluster, asked by streams of the Python client, whose work counts too
generate             transformers' `generate` in two processes that share the requests (in one where a single one runs);
                     knowing the lengths beforehand, it puts answers of like length into one batch
continuous_batching  transformers' continuous batching, in two processes that share the requests
vllm_cpu             vLLM as a pipeline of two stages; it has an environment of its own (`--vllm-python`)
===================  ===================================================================================================

A sample is a round's generated tokens per second while so many requests were running: until the last one of the list
began. `generate` has fewer and fewer running in each batch, so there it is the whole list's time. Times of tokens are
the subject's own, of peers in their processes, of LeMix in the client's.

`best` is the peer over which LeMix's ratio is the least, `best_pipeline` that among those that are pipelines.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from lemix import Client
from lemix.running import running_cluster
from lemix_benchmarks.client_load import closed_loop, streamed
from lemix_benchmarks.decoding import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Answer,
    Answered,
    Request,
    drawn_requests,
    percentile,
)
from lemix_benchmarks.model import BENCH_MODEL, write_bench_model
from lemix_benchmarks.peers import Program, continuous_batching, generate, running_peer, vllm_cpu
from lemix_benchmarks.report import Findings, Plan, Row, Skipped, Subject, Target, measure, ratio
from lemix_common.errors import BadInput, ClusterError
from lemix_common.settings import ClusterSettings

LEMIX: Final = "lemix"
PEERS: Final = ("generate", "continuous_batching", "vllm_cpu")
PIPELINES: Final = ("vllm_cpu",)
"""Of the peers, those that cut the model into stages."""
STAGES: Final = 2
BEST_LIMITS: Final = {1: 0.9, 4: None, 16: 1.0, 64: 1.0}
"""By concurrency: what LeMix must have at least, as a share of the best peer's."""
PIPELINE_LIMITS: Final = {16: 1.2, 64: 1.2}
AGREEMENT: Final = 0.95
"""Of the requests: their tokens are the same by all subjects, but where two tokens are almost equally likely."""
_UNIT: Final = "tokens/s"

AnswerAll = Callable[[Sequence[Request], int], Answered]
"""Answers a list of requests, keeping so many running."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much a run measures."""

    rounds: int
    counts: Mapping[int, int]
    """By concurrency, the requests of a round."""
    prompt_tokens: range
    new_tokens: range


FULL: Final = Size(5, {1: 5, 4: 16, 16: 48, 64: 160}, PROMPT_TOKENS, NEW_TOKENS)
ON_GPU: Final = Size(5, {1: 3, 4: 8, 16: 24, 64: 80}, range(16, 65), range(32, 65))
QUICK: Final = Size(2, {1: 3, 4: 8, 16: 24, 64: 80}, range(8, 17), range(4, 13))


@dataclass(eq=False)
class Contestant:
    """A subject, and its answers so far."""

    name: str
    answer: AnswerAll
    answers: dict[int, list[list[Answer]]] = field(default_factory=dict)
    """By concurrency, of each round, in the order of the requests."""

    def subject(self, concurrency: int, rounds: Sequence[Sequence[Request]]) -> Subject:
        """Answer the next round's requests each time; measures generated tokens per second."""
        left = iter(rounds)

        def once() -> float:
            requests = next(left)
            answered = self.answer(requests, concurrency)
            ordered = sorted(answered.answers, key=lambda answer: answer.number)
            require_whole(self.name, requests, ordered)
            self.answers.setdefault(concurrency, []).append(ordered)
            return answered.tokens_per_second

        return Subject(case(concurrency), self.name, once, unit=_UNIT)


def case(concurrency: int) -> str:
    """As INTERFACES names it."""
    return f"c{concurrency}"


def run(plan: Plan) -> Findings:
    """Measure all cases, in rounds."""
    size = QUICK if plan.quick else FULL if plan.device == "cpu" else ON_GPU
    if plan.vllm_python and shutil.which(plan.vllm_python) is None:
        raise BadInput(f"--vllm-python {plan.vllm_python}: there is no such program")
    with tempfile.TemporaryDirectory(prefix="lemix-bench-") as directory:
        folder = write_bench_model(Path(directory) / plan.model)
        with _contestants(folder, Path(directory), plan) as (contestants, versions, skipped):
            rows: tuple[Row, ...] = ()
            for concurrency, count in size.counts.items():
                rows += _measure(contestants, concurrency, count, size, plan.seed)
    # on a GPU everybody has kernels of his own, and rounding decides between random weights' tokens
    agreement = least_agreement(contestants, limit=AGREEMENT if plan.device == "cpu" else 0.0)
    return findings(rows, skipped, {"agreement": agreement, "versions": versions})


def findings(
    rows: Sequence[Row], skipped: Sequence[tuple[str, str]], further: Mapping[str, object]
) -> Findings:
    """The ratios of what was measured, and what they must be; without one of the peers there is no best one."""
    absent = {name for name, _ in skipped}
    ratios: dict[str, float] = {}
    targets = []
    for concurrency, limit in BEST_LIMITS.items():
        for name, peers, least in (
            (f"{case(concurrency)}_over_best", PEERS, limit),
            (f"{case(concurrency)}_over_best_pipeline", PIPELINES, PIPELINE_LIMITS.get(concurrency)),
        ):
            over = [ratio(rows, case(concurrency), LEMIX, peer) for peer in peers if peer not in absent]
            is_whole = absent.isdisjoint(peers)
            if over:
                ratios[name if is_whole else f"{name}_present"] = min(over)
            if least is not None:
                targets.append(Target(name, min(over) if is_whole else None, ">=", least))
    return Findings(
        rounds=len(rows[0].samples),
        threads=1,
        model=BENCH_MODEL,
        rows=tuple(rows),
        ratios=ratios,
        targets=tuple(targets),
        skipped=tuple(
            Skipped(case(concurrency), name, reason)
            for name, reason in skipped
            for concurrency in BEST_LIMITS
        ),
        further=further,
    )


def require_whole(name: str, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    """`ClusterError` unless every request got as many tokens as it asked for: else somebody did less work."""
    asked = {request.number: request.new_tokens for request in requests}
    got = {answer.number: len(answer.tokens) for answer in answers}
    wrong = [number for number in asked if asked[number] != got.get(number)]
    if wrong:
        number = wrong[0]
        raise ClusterError(
            f"{name} gave {got.get(number, 0)} tokens where {asked[number]} were asked for, "
            f"and {len(wrong) - 1} more answers of the wrong length"
        )


def least_agreement(contestants: Sequence[Contestant], *, limit: float = AGREEMENT) -> float:
    """The share of requests to which a subject gave the first one's tokens; `ClusterError` if it isn't nearly all."""
    first, *others = [
        [answer.tokens for rounds in contestant.answers.values() for round_ in rounds for answer in round_]
        for contestant in contestants
    ]
    least = 1.0
    for contestant, answers in zip(contestants[1:], others, strict=True):
        share = sum(map(tuple.__eq__, first, answers)) / len(first)
        if share < limit:
            raise ClusterError(
                f"{contestant.name} and {contestants[0].name} give the same tokens in {share:.0%} of the requests: "
                "they don't run the same model"
            )
        least = min(least, share)
    return least


def _measure(
    contestants: Sequence[Contestant], concurrency: int, count: int, size: Size, seed: int
) -> tuple[Row, ...]:
    # the first list doesn't count: it is short, and warms everybody
    first_seed = (seed * len(size.counts) + list(size.counts).index(concurrency)) * (size.rounds + 1)
    rounds = [
        drawn_requests(
            first_seed, concurrency + 1, prompt_tokens=QUICK.prompt_tokens, new_tokens=QUICK.new_tokens
        ),
        *(
            drawn_requests(
                first_seed + number, count, prompt_tokens=size.prompt_tokens, new_tokens=size.new_tokens
            )
            for number in range(1, size.rounds + 1)
        ),
    ]
    subjects = [contestant.subject(concurrency, rounds) for contestant in contestants]
    rows = measure(subjects, rounds=size.rounds, warm_ups=1)
    return tuple(
        replace(row, further=latencies(contestant.answers[concurrency][1:]))
        for row, contestant in zip(rows, contestants, strict=True)
    )


def latencies(rounds: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """To the first token, and between tokens, over all rounds."""
    answers = [answer for round_ in rounds for answer in round_]
    ttfts = [answer.ttft_s for answer in answers]
    itls = [itl for answer in answers for itl in answer.itls_s]
    return {
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "itl_p50_s": percentile(itls, 50),
        "itl_p99_s": percentile(itls, 99),
    }


@contextmanager
def _contestants(
    folder: Path, directory: Path, plan: Plan
) -> Iterator[tuple[list[Contestant], dict[str, str], list[tuple[str, str]]]]:
    """Those that there are here, the versions of the peers, and who isn't there, with the reason."""
    most = max(BEST_LIMITS)
    settings = ClusterSettings(
        model=str(folder), stages=STAGES, max_running=most, seed=plan.seed, device=plan.device
    )
    programs: list[Program] = [
        generate(folder, plan.device),
        continuous_batching(folder, plan.device, running=most // 2),
    ]
    skipped = []
    if plan.device != "cpu":
        skipped.append(("vllm_cpu", "it is a build for processors"))
    elif plan.vllm_python:
        programs.append(vllm_cpu(folder, plan.vllm_python))
    else:
        skipped.append(("vllm_cpu", "no environment with vLLM was named: --vllm-python"))
    with ExitStack() as stack:
        url = stack.enter_context(running_cluster(settings, data_dir=directory / "data"))
        client = stack.enter_context(Client(url))
        contestants = [
            Contestant(
                LEMIX,
                lambda requests, concurrency: closed_loop(partial(streamed, client), requests, concurrency),
            )
        ]
        versions = {}
        for program in programs:
            try:
                peer = stack.enter_context(running_peer(program, directory / f"{program.name}.log"))
                if plan.device != "cpu":  # not everything that starts there runs
                    peer.answer(drawn_requests(plan.seed, 2, prompt_tokens=QUICK.prompt_tokens), 2)
            except ClusterError as error:
                if plan.device == "cpu":
                    raise
                skipped.append((program.name, str(error)))
                continue
            contestants.append(Contestant(program.name, peer.answer))
            versions[program.name] = peer.version
        yield contestants, versions, skipped
