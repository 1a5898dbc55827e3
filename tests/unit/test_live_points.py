"""A point of a study as a cluster that runs has it, and as its simulated twin has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lemix_common.errors import BadInput
from lemix_studies.experiments.live import plan_live, settings_of
from lemix_studies.experiments.live_measures import measures_of_spans, trained_when_committed
from lemix_studies.experiments.settings import Point, Setting, Variant
from lemix_studies.experiments.twin import simulated_twin, twin_of
from lemix_studies.experiments.workloads import Sources
from lemix_studies.measures import IdleTimes, ItemTimes
from lemix_studies.probing import NUM_PROBES
from lemix_studies.replay import CommittedStep, Outcome

SETTING = Setting(
    study="test", model="dialogpt-large", nodes=4, stages=2, rate=300.0, training_rate=0.2, items=40
)
SOURCES = Sources(context_lengths={"dialogpt-large": 1024})


def span(cat: str, item: str, node: int, start: float, end: float) -> dict[str, Any]:
    """What a stage did."""
    return {"cat": cat, "item": item, "node": node, "stage": 0, "start": start, "end": end}


def outcome_of(spans: list[dict[str, Any]]) -> Outcome:
    """One example, in one step."""
    item = ItemTimes(item="e", kind="train", submitted=0.0, accepted=0.0, ends=["done"], ended=9.0)
    step = CommittedStep(run_id="main", step=1, items=("e",), weights_version="0.1", loss=None)
    return Outcome(
        arrivals={},
        items=[item],
        answers={},
        steps=[step],
        spans=list(spans),
        idle=IdleTimes(slo_base_s=1.0, ttft_s=1.0, itl_s=1.0),
        nodes=2,
        dead_lettered=0,
        max_lateness_s=0.0,
        weights_sha256={},
    )


def test_a_step_ends_where_it_was_computed() -> None:
    """A node that computed nothing of it comes to its optimizer's turn when it may; that ends, and begins, nothing."""
    outcome = outcome_of(
        [
            span("training_forward", "main:1:0", 1, 1.0, 2.0),
            span("training_backward", "main:1:0", 1, 2.0, 4.0),
            span("optimizer", "main:1", 1, 4.0, 5.0),
            span("optimizer", "main:1", 0, 7.0, 7.0),
        ]
    )
    assert trained_when_committed(outcome).items[0].ended == 5.0
    found = measures_of_spans(outcome)
    assert (found["active_nodes"], found["paper_span_s"], found["trained"]) == (1, 4.0, 1)


@pytest.mark.parametrize("release", ["s-pp", "a-pp"])
def test_who_computes_serves_what_it_learns(release: Any) -> None:
    """Real points learn one model and publish each step; emulated accelerators have nothing to publish."""
    setting = replace(SETTING, release=release)
    real = settings_of(setting, Variant(policy="jsq"), model="m", device="cpu")
    emulated = settings_of(setting, Variant(policy="jsq"), model="m", device="emulated:p.json")
    assert (real.replicas, real.publish_every) == ("allreduce", 1)
    assert emulated.publish_every > SETTING.items


def test_a_twin_has_what_the_cluster_is_asked(tmp_path: Path) -> None:
    """The same moments, kinds and nodes, and the tokens that workers compute: of a score all but the last."""
    plan = plan_live(
        Point(SETTING, Variant(policy="naive-mix")),
        on="emulated",
        model=None,
        folder=tmp_path,
        sources=SOURCES,
    )
    twin = twin_of(plan)
    scores = [arrival for arrival in plan.arrivals if arrival.kind == "score"]
    assert [work.arrived_at for work in twin.requests] == [arrival.at_s for arrival in scores]
    assert [work.tokens for work in twin.requests] == [
        len(arrival.prompt) + len(arrival.reference) - 1 for arrival in scores
    ]
    assert twin.requests[0].number == NUM_PROBES + 1
    assert [work.number for work in twin.training] == list(range(8))
    assert twin.is_as_workers
    assert twin.profile.stages == plan.profile.stages if plan.profile else False


def test_a_twin_s_measures_do_not_depend_on_the_slowdown() -> None:
    """They are those of the accelerator that is meant."""
    point = Point(SETTING, Variant(policy="naive-mix"))
    fast, slow = (simulated_twin(point, sources=SOURCES, slowdown=factor) for factor in (2.0, 20.0))
    assert fast["response_s"] == pytest.approx(slow["response_s"])
    assert fast["items_per_second"] == pytest.approx(slow["items_per_second"])


def test_steps_that_overlap_have_no_twin() -> None:
    """A cluster shares them among all nodes, the simulator doesn't: it is said, not simulated otherwise."""
    with pytest.raises(BadInput, match="a-pp"):
        simulated_twin(Point(replace(SETTING, release="a-pp"), Variant(policy="jsq")), sources=SOURCES)
