from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Barrier, Lock

import pytest

from lemix_benchmarks import decode
from lemix_benchmarks.client_load import closed_loop, open_loop
from lemix_benchmarks.decode import Contestant, findings, latencies, least_agreement, require_whole
from lemix_benchmarks.decoding import (
    Answer,
    Answered,
    Request,
    by_new_tokens,
    drawn_requests,
    percentile,
    poisson_arrivals,
)
from lemix_benchmarks.report import Plan, Row
from lemix_common.errors import BadInput, ClusterError


def request(number: int, new_tokens: int = 1, prompt_tokens: int = 1) -> Request:
    return Request(number, (2,) * prompt_tokens, new_tokens)


def answer(number: int, *tokens: int, at: Sequence[float] = (), submitted_at: float = 0.0) -> Answer:
    return Answer(number, submitted_at, tokens, tuple(at) or (1.0,) * len(tokens))


def rows(**tokens_per_second: tuple[float, ...]) -> tuple[Row, ...]:
    """The same in all cases."""
    return tuple(
        Row(decode.case(concurrency), name, samples, unit="tokens/s")
        for concurrency in decode.BEST_LIMITS
        for name, samples in tokens_per_second.items()
    )


def test_requests_are_drawn_by_a_seed_with_mixed_lengths() -> None:
    """The same seed gives everybody the same; prompts and answers have the lengths asked for."""
    drawn = drawn_requests(3, 200, prompt_tokens=range(2, 5), new_tokens=range(7, 9))
    assert [each.number for each in drawn] == list(range(200))
    assert {len(each.prompt) for each in drawn} == {2, 3, 4}
    assert {each.new_tokens for each in drawn} == {7, 8}
    assert drawn[:9] == drawn_requests(3, 9, prompt_tokens=range(2, 5), new_tokens=range(7, 9))
    assert drawn[:9] != drawn_requests(4, 9, prompt_tokens=range(2, 5), new_tokens=range(7, 9))


def test_arrivals_are_as_many_a_second_as_asked_and_irregular() -> None:
    """Independent of one another: the gaps' deviation is their mean."""
    arrivals = poisson_arrivals(1, 4000, per_second=8.0)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert deviation == pytest.approx(1 / 8, rel=0.1)
    assert arrivals == poisson_arrivals(1, 4000, per_second=8.0)


def test_batches_are_of_answers_of_like_length() -> None:
    """The longest first, so that what is left at the end is short."""
    batches = by_new_tokens([request(0, 3), request(1, 9), request(2, 5), request(3, 9), request(4, 1)], 2)
    assert [[each.number for each in batch] for batch in batches] == [[1, 3], [2, 0], [4]]


def test_only_tokens_of_the_measured_time_count() -> None:
    """What came when fewer and fewer requests were running says nothing about so many."""
    answered = Answered((answer(0, 5, 5, at=(1.0, 2.0)), answer(1, 5, 5, at=(4.0, 6.0))), 0.0, 4.0)
    assert answered.tokens_per_second == 3 / 4


def test_latencies_are_of_all_requests_and_all_gaps() -> None:
    """To the first token from the submit; between tokens within a request."""
    first = answer(0, 1, 2, 3, at=(1.5, 2.0, 4.0), submitted_at=1.0)
    second = answer(1, 1, at=(4.5,), submitted_at=3.0)
    found = latencies([[first], [second]])
    assert found["ttft_p50_s"] == 1.0
    assert found["itl_p50_s"] == 1.25
    assert found["ttft_p99_s"] == pytest.approx(1.49)
    assert percentile([7.0], 99) == 7.0


def test_so_many_requests_run_at_a_time_and_the_time_ends_with_the_last_hand_out() -> None:
    """Three users meet in each of the two turns: nobody waits for more than one answer of the others."""
    together = Barrier(3, timeout=20.0)
    lock, seen = Lock(), set[int]()

    def answer_one(asked: Request) -> Answer:
        together.wait()
        with lock:
            seen.add(asked.number)
        return answer(asked.number, 5, at=(2.0,))

    answered = closed_loop(answer_one, [request(number) for number in range(6)], 3)
    assert seen == {each.number for each in answered.answers} == set(range(6))
    assert answered.began < answered.ended


def test_requests_arrive_whatever_became_of_those_before() -> None:
    """All run at once though none is done."""
    together = Barrier(3, timeout=20.0)

    def answer_one(asked: Request) -> Answer:
        together.wait()
        return answer(asked.number, 5)

    answered = open_loop(answer_one, [request(number) for number in range(3)], [0.0, 0.001, 0.002])
    assert [each.number for each in answered.answers] == [0, 1, 2]


def test_the_ratio_is_over_the_peer_that_is_hardest_to_beat() -> None:
    """Over every peer it is at least that; only pipelines count for the pipelines' targets."""
    found = findings(
        rows(lemix=(6.0, 6.0), generate=(6.0, 6.0), continuous_batching=(3.0, 8.0), vllm_cpu=(4.0, 4.0)),
        [],
        {},
    )
    assert found.ratios["c16_over_best"] == 1.0
    assert found.ratios["c16_over_best_pipeline"] == 1.5
    assert [(each.name, each.value, each.op, each.limit) for each in found.targets] == [
        ("c1_over_best", 1.0, ">=", 0.9),
        ("c16_over_best", 1.0, ">=", 1.0),
        ("c16_over_best_pipeline", 1.5, ">=", 1.2),
        ("c64_over_best", 1.0, ">=", 1.0),
        ("c64_over_best_pipeline", 1.5, ">=", 1.2),
    ]
    assert found.met_all_targets


def test_without_vllm_every_target_is_missed() -> None:
    """However fast LeMix is beside the others, whose ratio has a name of its own; the reason stands in `skipped`."""
    measured = rows(lemix=(9.0,), generate=(1.0,), continuous_batching=(2.0,))
    found = findings(measured, [("vllm_cpu", "not here")], {})
    assert len(found.targets) == 5
    assert not any(target.is_met for target in found.targets)
    assert all(target.to_json()["value"] is None for target in found.targets)
    assert found.ratios == {f"c{concurrency}_over_best_present": 4.5 for concurrency in (1, 4, 16, 64)}
    assert {(each.case, each.subject, each.reason) for each in found.skipped} == {
        (f"c{concurrency}", "vllm_cpu", "not here") for concurrency in (1, 4, 16, 64)
    }


def test_who_gives_fewer_tokens_is_not_compared() -> None:
    """A ratio would mean nothing."""
    asked = [request(0, 2), request(1, 3)]
    require_whole("peer", asked, [answer(0, 5, 5), answer(1, 5, 5, 5)])
    with pytest.raises(ClusterError, match="peer gave 1 tokens where 3 were asked for"):
        require_whole("peer", asked, [answer(0, 5, 5), answer(1, 5)])


def test_subjects_must_give_the_same_tokens() -> None:
    """But for ties: nearly all requests' tokens are the same, or they run another model."""
    ours, theirs = (
        Contestant(name, lambda *_: Answered((), 0.0, 1.0), {1: [[answer(n, n) for n in range(100)]]})
        for name in ("lemix", "peer")
    )
    assert least_agreement([ours, theirs]) == 1.0
    theirs.answers[1][0][7] = answer(7, 0)
    assert least_agreement([ours, theirs]) == 0.99
    theirs.answers[1][0] = [answer(n, n + 1) for n in range(100)]
    with pytest.raises(ClusterError, match="peer and lemix give the same tokens in 0% of the requests"):
        least_agreement([ours, theirs])


def test_a_sample_is_one_round_and_rounds_are_the_same_for_everybody() -> None:
    """Each subject goes through the lists by itself, once each."""
    lists = [drawn_requests(seed, 4, new_tokens=range(2, 3)) for seed in (1, 2)]

    def answer_all(requests: Sequence[Request], concurrency: int) -> Answered:
        assert concurrency == 2
        answers = (answer(each.number, 5, 5, at=(1.0, 2.0)) for each in reversed(requests))
        return Answered(tuple(answers), 0.0, 4.0)

    contestant = Contestant("lemix", answer_all)
    subject = contestant.subject(2, lists)
    assert [subject.once(), subject.once()] == [2.0, 2.0]
    assert [[each.number for each in round_] for round_ in contestant.answers[2]] == [[0, 1, 2, 3]] * 2


def test_a_python_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    """Before anything is started."""
    absent = str(tmp_path / "python")
    with pytest.raises(BadInput, match="there is no such program"):
        decode.run(Plan(vllm_python=absent))
