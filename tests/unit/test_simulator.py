from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest

from lemix_common.costs import Cost
from lemix_common.errors import BadInput
from lemix_coordinator.scheduling.cluster_state import ClusterState
from lemix_coordinator.scheduling.prediction import trace
from lemix_coordinator.scheduling.work import Decision, Resize, Work
from lemix_studies.simulator import Interval, Outcome, Scenario, measures, simulate, slo_base_s
from lemix_studies.simulator.scenario import Batching, Order, Release
from simulated_loads import ByTurns, line_profile, poisson_load, work_of

SECOND = Cost(base=1.0)
"""Of a forward, whatever it is of."""


def of_stage(outcome: Outcome, stage: int) -> list[tuple[str, str, float, float, str]]:
    """What node 0's stage did: category, item, from, to, why it waited."""
    return [
        (one.cat, one.item, round(one.began, 6), round(one.ended, 6), one.waited_for)
        for one in outcome.intervals
        if one.node == 0 and one.stage == stage
    ]


def test_an_idle_node_answers_after_the_sum_of_its_stages() -> None:
    """And of the hops between them."""
    profile = line_profile(3, hop=Cost(base=0.001, token=1e-6))
    work = work_of(0, at=5.0)
    record = simulate(Scenario(profile=profile, nodes=2, policy=ByTurns(), requests=[work])).records[0]
    assert record.response_s == pytest.approx(3 * 0.02 + 2 * 0.0011)
    assert slo_base_s(profile, [work]) == pytest.approx(3 * 0.02)
    assert (record.placed_at, record.began_at, record.node) == (5.0, 5.0, 0)


@pytest.mark.parametrize("order", ["fifo", "urgency"])
@pytest.mark.parametrize("release", ["s-pp", "a-pp"])
@pytest.mark.parametrize("kind", ["score", "generate"])
def test_everything_ends_once(order: Order, release: Release, kind: str) -> None:
    """Also with nodes that come and go: as many records as items, each begun and ended after it came, all work done."""
    requests, training = poisson_load(150, 20, kind="generate" if kind == "generate" else "score", new=5)
    policy = ByTurns({0.0: Resize(close=(2,)), 1.0: Resize(open=(2,)), 2.0: Resize(close=(0, 1))})
    profile = line_profile(hop=Cost(base=1e-4))
    outcome = simulate(
        Scenario(
            profile=profile,
            nodes=3,
            policy=policy,
            requests=requests,
            training=training,
            order=order,
            release=release,
            microbatches=2,
            keep_intervals=True,
        )
    )
    assert [record.item for record in outcome.records] == [work.item for work in (*requests, *training)]
    for record in outcome.records:
        assert record.arrived_at <= record.placed_at <= record.began_at < record.ended_at
    trained_s = sum(one.ended - one.began for one in outcome.intervals if one.cat.startswith("training"))
    rows_s = sum(0.01 * len(work.lengths) + 1e-4 * work.tokens for work in training)
    assert trained_s == pytest.approx(2 * 3 * rows_s)  # two stages, forward and twice as much back
    assert_nothing_overlaps(outcome.intervals)


def assert_nothing_overlaps(intervals: Sequence[Interval]) -> None:
    """A stage does one thing at a time."""
    ordered = sorted(intervals, key=lambda one: (one.node, one.stage, one.began))
    for earlier, later in pairwise(ordered):
        if (earlier.node, earlier.stage) == (later.node, later.stage):
            assert earlier.ended <= later.began + 1e-9


def test_equal_scenarios_have_equal_outcomes() -> None:
    """To the last bit, and what is kept changes nothing."""
    requests, training = poisson_load(120, 30)

    def run(seed: int, *, keeps: bool = True) -> Outcome:
        loads = poisson_load(120, 30, seed=seed)
        return simulate(
            Scenario(
                profile=line_profile(),
                nodes=2,
                policy=ByTurns(),
                requests=loads[0],
                training=loads[1],
                order="urgency",
                keep_intervals=keeps,
            )
        )

    assert (requests, training) == poisson_load(120, 30)
    assert run(0) == run(0) != run(1)
    assert run(0, keeps=False).records == run(0).records


def test_a_far_dependency_is_a_backward_that_came_first() -> None:
    """A longer item reaches stage 1 when the backward of the one before runs there; a shorter one gets there first."""
    profile = line_profile(forward=Cost(token=0.01))

    def second(tokens: int) -> list[tuple[str, str, float, float, str]]:
        policy = ByTurns()
        training = [
            work_of(number, kind="train", lengths=(size,)) for number, size in ((0, 100), (1, tokens))
        ]
        outcome = simulate(
            Scenario(
                profile=profile,
                nodes=1,
                policy=policy,
                training=training,
                release="a-pp",
                keep_intervals=True,
            )
        )
        return [one for one in of_stage(outcome, 1) if one[1] == "train-1" and one[0] == "training_forward"]

    assert second(150) == [
        ("training_forward", "train-1", 4.0, 5.5, "far")
    ]  # ready at 2.5, B of train-0: 2 to 4
    assert second(50) == [("training_forward", "train-1", 2.0, 2.5, "")]  # ready at 1.5, behind F of train-0


def test_an_immediate_dependency_is_a_stage_that_waited_for_the_one_before() -> None:
    """A request on an idle node; the next one finds stage 1 at work."""
    requests = [work_of(0, 0.0), work_of(1, 0.0)]
    outcome = simulate(
        Scenario(
            profile=line_profile(forward=SECOND),
            nodes=1,
            policy=ByTurns(),
            requests=requests,
            keep_intervals=True,
        )
    )
    assert of_stage(outcome, 0) == [("prefill", "score-0", 0, 1, ""), ("prefill", "score-1", 1, 2, "")]
    assert of_stage(outcome, 1) == [
        ("prefill", "score-0", 1, 2, "immediate"),
        ("prefill", "score-1", 2, 3, "immediate"),
    ]


@pytest.mark.parametrize(
    ("release", "released_at"),
    [("s-pp", [0.0, 6.005, 12.01]), ("a-pp", [0.0, 1.0, 2.0])],
)
def test_the_next_training_item_is_released_by_the_rule(release: Release, released_at: list[float]) -> None:
    """S-PP: the last one's step has ended, anywhere; A-PP: its forward has left stage 0."""
    training = [work_of(number, kind="train") for number in range(3)]
    outcome = simulate(
        Scenario(
            profile=line_profile(forward=SECOND),
            nodes=3,
            policy=ByTurns(),
            training=training,
            release=release,
        )
    )
    assert [record.arrived_at for record in outcome.records] == pytest.approx(released_at)


@pytest.mark.parametrize(
    ("schedule", "first_stage"),
    [("gpipe", "F0 F1 F2 B0 B1 B2"), ("1f1b", "F0 F1 B0 F2 B1 B2")],
)
def test_microbatches_follow_their_schedule(schedule: str, first_stage: str) -> None:
    """Each stage does its order, whatever comes earlier; rows of different lengths tell the microbatches apart."""
    work = work_of(0, kind="train", lengths=(100, 200, 300))
    outcome = simulate(
        Scenario(
            profile=line_profile(forward=Cost(token=1.0)),
            nodes=1,
            policy=ByTurns(),
            training=[work],
            microbatches=3,
            schedule="gpipe" if schedule == "gpipe" else "1f1b",
            keep_intervals=True,
        )
    )
    letters = {"training_forward": ("F", 100), "training_backward": ("B", 200)}
    done = [
        f"{letters[cat][0]}{round((to - since) / letters[cat][1]) - 1}"
        for cat, _, since, to, _ in of_stage(outcome, 0)
        if cat in letters
    ]
    assert " ".join(done) == first_stage


def test_waiting_is_that_of_a_queue_with_constant_service() -> None:
    """M/D/1 at 70 % load: mean wait ρ s ÷ 2 (1 - ρ) (Pollaczek and Khinchine), within 4 %."""
    randomness = random.Random(3)
    service_s, load = 0.02, 0.7
    now = 0.0
    requests: list[Work] = []
    for number in range(40_000):
        now += randomness.expovariate(load / service_s)
        requests.append(work_of(number, now))
    outcome = simulate(
        Scenario(profile=line_profile(1), nodes=1, policy=ByTurns(uses_state=False), requests=requests)
    )
    waits = [record.began_at - record.arrived_at for record in outcome.records]
    assert fmean(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.04)


def test_node_seconds_count_loading_and_draining() -> None:
    """Node 1 is closed at 0.5 s, works until 3 s, is opened at 5 s, loads for 1 s, and stays to the end at 9 s."""
    policy = ByTurns({0.5: Resize(close=(1,)), 5.0: Resize(open=(1,))})
    profile = line_profile(1, forward=Cost(base=3.0))
    requests = [work_of(0, 0.0), work_of(1, 0.0), work_of(2, 5.0), work_of(3, 5.05)]
    outcome = simulate(Scenario(profile=profile, nodes=2, policy=policy, requests=requests))
    assert [node for node, _, _ in outcome.held] == [0, 1, 1]
    assert [span for _, *span in outcome.held] == [pytest.approx(span) for span in ([0, 9], [0, 3], [5, 9])]
    assert (
        outcome.node_seconds == sum(to - since for _, since, to in outcome.held) == pytest.approx(9 + 3 + 4)
    )
    assert outcome.duration_s == pytest.approx(9)
    assert outcome.records[3].began_at == pytest.approx(6.0)
    assert outcome.paper_span_s == pytest.approx(8 + 9)


def test_training_gives_way_at_its_next_safepoint() -> None:
    """By urgency a request waits for less than a cut, and training loses no more than the request's time."""
    scenario = Scenario(
        profile=line_profile(1, forward=SECOND),
        nodes=1,
        policy=ByTurns(),
        requests=[work_of(1, 0.25)],
        training=[work_of(0, kind="train")],
        order="urgency",
        cut_s=0.1,
        keep_intervals=True,
    )
    assert of_stage(simulate(scenario), 0) == [
        ("training_forward", "train-0", 0, 0.3, ""),
        ("prefill", "score-1", 0.3, 1.3, ""),
        ("training_forward", "train-0", 1.3, 2, ""),
        ("training_backward", "train-0", 2, 4, ""),
        ("optimizer", "train-0", 4, 4.005, ""),
    ]


def test_training_has_its_least_share() -> None:
    """Requests that never let go of the stage leave training a tenth of it."""
    requests = [work_of(number, 0.01 * number) for number in range(400)]
    scenario = Scenario(
        profile=line_profile(1),
        nodes=1,
        policy=ByTurns(),
        requests=requests,
        training=[work_of(400 + number, kind="train", lengths=(1000,)) for number in range(30)],
        order="urgency",
        min_training_share=0.1,
        keep_intervals=True,
    )
    intervals = [one for one in simulate(scenario).intervals if one.ended < 5.0]
    trained_s = sum(one.ended - one.began for one in intervals if one.cat != "prefill")
    assert trained_s / 5.0 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("batching", "ttft_s"), [("iteration", [0.04, 0.06]), ("paper", [0.06, 0.06])])
def test_generations_share_iterations(batching: Batching, ttft_s: list[float]) -> None:
    """Each gets its tokens, one an iteration: by turns in two groups, or the paper's way after waiting for company."""
    requests = [work_of(0, 0.0, kind="generate", new=4), work_of(1, 0.005, kind="generate", new=4)]
    outcome = simulate(
        Scenario(
            profile=line_profile(forward=Cost(base=0.0, token=2e-4)),
            nodes=1,
            policy=ByTurns(),
            requests=requests,
            decode_batch=2,
            batching=batching,
            batch_wait_s=0.01,
            keep_intervals=True,
        )
    )
    assert all(len(record.gaps_s) == 3 for record in outcome.records)
    assert measures(outcome)["itl_s"] is not None
    if batching == "paper":
        (first,) = {one.began for one in outcome.intervals if one.stage == 0 and one.cat == "prefill"}
        assert first == pytest.approx(0.005)  # both are there: a full batch waits no longer
        assert outcome.records[0].gaps_s == pytest.approx([0.02, 0.02, 0.02])
    else:
        assert outcome.records[0].first_token_at == pytest.approx(ttft_s[0])
        assert outcome.records[1].first_token_at == pytest.approx(ttft_s[1])


def test_scores_share_passes_as_in_the_workers() -> None:
    """At most so many tokens a pass, in chunks, as many passes on their way as stages; nothing is computed twice.

    That a score has ended is known when its first stage is between two passes.
    """
    requests = [work_of(number, lengths=(100,)) for number in range(3)]
    outcome = simulate(
        Scenario(
            profile=line_profile(2, forward=Cost(base=0.01, token=1e-4)),
            nodes=1,
            policy=ByTurns(),
            requests=requests,
            pass_tokens=150,
            keep_intervals=True,
        )
    )
    passes = [(one.item, one.others, one.began, one.ended) for one in outcome.intervals if not one.stage]
    expected: list[object] = [
        ("score-0", (), 0, pytest.approx(0.02)),  # the first to come is alone
        ("score-1", ("score-2",), pytest.approx(0.02), pytest.approx(0.045)),  # and half of the third
        ("score-2", (), pytest.approx(0.045), pytest.approx(0.06)),
    ]
    assert passes == expected
    assert [record.ended_at for record in outcome.records] == pytest.approx([0.045, 0.07, 0.085])


@pytest.mark.parametrize("order", ["fifo", "urgency"])
@pytest.mark.parametrize("kind", ["score", "generate"])
def test_everything_ends_once_as_in_the_workers(order: Order, kind: str) -> None:
    """By their rules, too: all is trained, one step at a time, and nothing overlaps."""
    requests, training = poisson_load(100, 20, kind="generate" if kind == "generate" else "score", new=5)
    outcome = simulate(
        Scenario(
            profile=line_profile(hop=Cost(base=1e-4)),
            nodes=3,
            policy=ByTurns(),
            requests=requests,
            training=training,
            order=order,
            microbatches=2,
            pass_tokens=512,
            keep_intervals=True,
        )
    )
    assert [record.item for record in outcome.records] == [work.item for work in (*requests, *training)]
    trained_s = sum(one.ended - one.began for one in outcome.intervals if one.cat.startswith("training"))
    rows_s = sum(0.01 * len(work.lengths) + 1e-4 * work.tokens for work in training)
    assert trained_s == pytest.approx(2 * 3 * rows_s)
    assert_nothing_overlaps(outcome.intervals)


def test_the_next_step_comes_with_the_commit_as_in_the_workers() -> None:
    """On another node it begins at once; on the same one each stage runs the optimizer first."""
    training = [work_of(number, kind="train") for number in range(3)]
    outcome = simulate(
        Scenario(
            profile=line_profile(2),
            nodes=2,
            policy=ByTurns(),
            training=[training[0], replace(training[1], number=0), training[2]],
            pass_tokens=512,
        )
    )
    step_s = 2 * 0.02 + 2 * 0.04  # both stages' forwards and backwards
    began = [record.began_at for record in outcome.records]
    assert [record.node for record in outcome.records] == [0, 0, 0]
    assert began == pytest.approx([0.0, step_s + 0.005, 2 * (step_s + 0.005)])
    elsewhere = simulate(
        Scenario(profile=line_profile(2), nodes=3, policy=ByTurns(), training=training, pass_tokens=512)
    )
    assert [record.began_at for record in elsewhere.records] == pytest.approx([0.0, step_s, 2 * step_s])


def test_requests_take_what_was_predicted() -> None:
    """Where they come in order and nothing trains, a prediction at their placing is what happens."""
    profile = line_profile(3, hop=Cost(base=1e-3, token=1e-6))
    requests, _ = poisson_load(100, 60, share=0.0)
    outcome = simulate(Scenario(profile=profile, nodes=2, policy=ByTurns(), requests=requests))
    state = ClusterState.idle(profile, 2)
    for work, record in zip(requests, outcome.records, strict=True):
        assert trace(state, work, record.node, work.arrived_at).response_s == pytest.approx(record.response_s)
        state = state.assigned(work, record.node, work.arrived_at)


def test_what_finds_no_memory_waits_and_is_not_dropped() -> None:
    """Room for one prompt's cache: the second begins when the first has ended. One that never fits is refused."""
    profile = line_profile(1, kv_token_bytes=1.0, memory_bytes=150)
    requests = [work_of(number, 0.0, kind="generate", new=5) for number in range(2)]
    first, second = simulate(Scenario(profile=profile, nodes=1, policy=ByTurns(), requests=requests)).records
    assert second.began_at == first.ended_at
    without = Scenario(profile=profile, nodes=1, policy=ByTurns(), requests=requests, checks_memory=False)
    assert simulate(without).records[1].began_at < first.ended_at
    large = [work_of(0, 0.0, kind="generate", lengths=(200,), new=5)]
    with pytest.raises(BadInput, match="can never run"):
        simulate(Scenario(profile=profile, nodes=1, policy=ByTurns(), requests=large))


class Refusing(ByTurns):
    """Has one item on the cluster at a time."""

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        if state.unfinished_N.sum():
            return Decision(node=None, reason="one at a time")
        return super().place(state, work, now)


def test_a_refused_item_is_asked_about_again() -> None:
    """In order of arrival, as soon as something has ended; none is forgotten."""
    requests = [work_of(number, 0.001 * number) for number in range(5)]
    outcome = simulate(Scenario(profile=line_profile(1), nodes=2, policy=Refusing(), requests=requests))
    assert [record.placed_at for record in outcome.records] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])


class Never(ByTurns):
    """Places nothing."""

    def place(self, state: ClusterState, work: Work, now: float) -> Decision:
        del state, work
        return Decision(node=None, again_at=now + 0.5)


def test_a_policy_that_places_nothing_is_refused() -> None:
    """It would go on for ever; a closed node isn't a place either."""
    with pytest.raises(BadInput, match="places nothing"):
        simulate(Scenario(profile=line_profile(), nodes=1, policy=Never(), requests=[work_of(0)]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 0}, "0 nodes"),
        ({"schedule": "zero-bubble"}, "no schedule"),
        ({"requests": [work_of(0, 1.0), work_of(1, 0.5)]}, "order of arrival"),
        ({"requests": [work_of(0), work_of(0)]}, "one name"),
        ({"training": [work_of(0)]}, "a request among"),
        ({"requests": [work_of(0, kind="generate")]}, "0 tokens"),
    ],
)
def test_an_impossible_scenario_is_refused(changes: dict[str, object], says: str) -> None:
    """One clear error."""
    given = {"profile": line_profile(), "nodes": 1, "policy": ByTurns(), **changes}
    with pytest.raises(BadInput, match=says):
        Scenario(**given)  # type: ignore[arg-type]


def test_measures_have_the_names_of_all_reports() -> None:
    """And their definitions: SLOs by the idle base, rates by wall, node and the paper's seconds."""
    requests = [work_of(number, 0.0) for number in range(10)]
    training = [work_of(10, 0.001, kind="train")]
    outcome = simulate(
        Scenario(profile=line_profile(1), nodes=1, policy=ByTurns(), requests=requests, training=training)
    )
    found = measures(outcome)
    # Requests come first, one after another, 20 ms each; the training item behind them.
    assert found["slo_base_s"] == pytest.approx(0.02)
    assert found["slo_attainment"] == pytest.approx({"1": 0.1, "5": 0.5, "10": 1.0})
    assert found["duration_s"] == pytest.approx(10 * 0.02 + 0.02 + 0.04 + 0.005)
    assert found["goodput_per_second"] == pytest.approx(6 / 0.265)
    assert found["items_per_node_second"] == found["paper_throughput"] == pytest.approx(11 / 0.265)
    assert found["submitted"] == found["done"] == 11
    assert measures(outcome, 0.2)["slo_attainment"] == {"1": 1.0, "5": 1.0, "10": 1.0}
