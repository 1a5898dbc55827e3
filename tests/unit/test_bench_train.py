from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lemix_benchmarks import train
from lemix_benchmarks.batches import (
    Batch,
    Example,
    Trained,
    by_length,
    dealt,
    made_up_batches,
    padding_share,
    real_tokens,
    sampled_rows,
)
from lemix_benchmarks.pipelining import PaddedStep
from lemix_benchmarks.report import Row, measure
from lemix_benchmarks.train import Contestant, findings, largest_difference
from lemix_common.errors import ClusterError


def example(num_tokens: int, reference: int = 1) -> Example:
    return Example(tuple(range(num_tokens - reference)), tuple(range(reference)))


def lengths(batch: Batch) -> list[int]:
    return [each.num_tokens for each in batch]


def contestant(name: str, *losses: float) -> Contestant:
    return Contestant(name, lambda _: Trained(1.0, ()), list(losses))


def rows(case: str, ours: Sequence[float], theirs: Sequence[float]) -> tuple[Row, ...]:
    return Row(case, "lemix", tuple(ours)), Row(case, "torch_pipelining", tuple(theirs))


def test_made_up_examples_ask_for_every_token_but_the_first() -> None:
    """So a peer that computes all positions computes nothing in vain; the same seed gives the same."""
    batch = next(made_up_batches(3, examples=2, tokens=5, vocabulary=9))
    assert [(len(each.prompt), len(each.reference)) for each in batch] == [(1, 4), (1, 4)]
    assert all(2 <= token < 9 for each in batch for token in each.prompt + each.reference)
    first, second, other = (
        list(islice(made_up_batches(seed, examples=2, tokens=5, vocabulary=9), 3)) for seed in (3, 3, 4)
    )
    assert first == second != other
    assert first[0] != first[1]


def test_batches_are_put_together_by_length() -> None:
    """The shortest together; the longest that don't fill a batch are left over."""
    batches = by_length([example(length) for length in (9, 2, 7, 3, 8)], 2)
    assert [lengths(batch) for batch in batches] == [[2, 3], [7, 8]]


def test_every_round_has_short_and_long_batches_and_none_twice() -> None:
    """As many as any other; what doesn't go round is left over."""
    batches = [(example(length),) for length in range(1, 8)]
    rounds = dealt(batches, 3)
    assert [[lengths(batch)[0] for batch in each] for each in rounds] == [[1, 4], [2, 5], [3, 6]]


def test_padding_is_what_a_batch_s_longest_adds_to_the_others() -> None:
    """Of 3 × 4 + 2 × 2 positions, 4 are padding."""
    batches = [(example(2), example(4), example(2)), (example(2), example(2))]
    assert real_tokens(batches) == 12
    assert padding_share(batches) == 0.25
    assert padding_share(batches[1:]) == padding_share([]) == 0.0


def test_a_sample_leaves_out_what_is_over_its_95th_percentile(tmp_path: Path) -> None:
    """The same seed draws the same rows; prompt and reference are the row's question and answer."""
    path, words = tmp_path / "rows.jsonl", " ".join("w" * 40)
    path.write_text(
        "".join(
            json.dumps({"question": words[: 2 * length - 1], "answer": "a"}) + "\n" for length in range(1, 41)
        )
    )
    tokenizer = Tokenizer(WordLevel({"w": 0, "a": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    sample = sampled_rows(path, tokenizer, count=40, seed=0)
    assert sorted(each.num_tokens for each in sample) == [length + 1 for length in range(1, 39)]
    assert {each.reference for each in sample} == {(1,)}
    assert sampled_rows(path, tokenizer, count=20, seed=1) == sampled_rows(path, tokenizer, count=20, seed=1)


def test_the_peer_asks_for_the_same_targets_as_the_cluster() -> None:
    """At each position the token that follows, where it is the reference's; padding is on the right, asked nothing."""
    step = PaddedStep.of((Example((5, 6), (7, 8)), Example((3,), (4,))))
    assert step.ids_BT.tolist() == [[5, 6, 7, 8], [3, 4, 0, 0]]
    assert step.targets_BT.tolist() == [[-100, 7, 8, -100], [4, -100, -100, -100]]
    assert step.num_targets == 3


def test_a_sample_is_the_real_tokens_of_a_round_per_second() -> None:
    """Each subject goes through the rounds by itself, once each; a round's padding is nobody's merit."""
    seen: list[list[int]] = []

    def run(batches: Sequence[Batch]) -> Trained:
        seen.append([length for batch in batches for length in lengths(batch)])
        return Trained(2.0, (0.5,) * len(batches))

    subject = Contestant("lemix", run)
    rounds = [[(example(3), example(5))], [(example(4), example(6)), (example(1), example(1))]]
    (row,) = measure([subject.subject("fixed", rounds)], rounds=2, warm_ups=0)
    assert (row.samples, row.unit) == ((4.0, 6.0), "tokens/s")
    assert seen == [[3, 5], [4, 6, 1, 1]]
    assert subject.losses == [0.5] * 3


def test_losses_are_compared_step_by_step() -> None:
    """What differs by more than rounding isn't the same training, and then no ratio means anything."""
    assert largest_difference(
        [contestant("a", 1.0, 2.0), contestant("b", 1.0, 2.0 - 2**-12)]
    ) == pytest.approx(2**-12)
    with pytest.raises(ClusterError, match=r"differ by 0\.5"):
        largest_difference([contestant("a", 1.0, 2.0), contestant("b", 1.0, 2.5)])
    with pytest.raises(ClusterError, match="differ by nan"):
        largest_difference([contestant("a", float("nan")), contestant("b", 1.0)])


def test_the_targets_are_those_of_the_issue() -> None:
    """As fast where nobody pads; where the peer pads, faster by 0.95 of what the padding costs it."""
    measured = rows("fixed", (2.0, 2.0), (2.0, 4.0)) + rows("gsm8k", (3.0, 3.0), (2.0, 2.0))
    found = findings(measured, 1e-6, 0.5)
    assert found.ratios == {"fixed": 0.75, "gsm8k": 1.5}
    assert [(each.name, each.value, each.op, each.limit) for each in found.targets] == [
        ("fixed", 0.75, ">=", 1.0),
        ("gsm8k", 1.5, ">=", 1.9),
    ]
    assert not any(target.is_met for target in found.targets)
    assert found.further == {"max_loss_difference": 1e-6, "padding_share": 0.5}
    assert not found.skipped


def test_without_the_text_its_case_is_skipped_with_a_reason() -> None:
    """For both subjects; the other case's target stays."""
    found = findings(rows("fixed", (2.0,), (2.0,)), 0.0, 0.0)
    assert found.ratios == {"fixed": 1.0}
    assert [target.name for target in found.targets] == ["fixed"]
    assert {(each.case, each.subject) for each in found.skipped} == {
        ("gsm8k", "lemix"),
        ("gsm8k", "torch_pipelining"),
    }
    assert all(train.ROWS.name in each.reason for each in found.skipped)
