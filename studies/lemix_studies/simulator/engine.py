"""The simulator: discrete events over nodes of stages, with the coordinator's policies.

Its parts: `placing` asks the policy and opens and closes nodes; `stages` are servers that do one thing at a time;
`scores`, `trainings` and `generations` know what follows what. They share a `run`. Events of one moment happen in the
order in which they were caused, so equal scenarios have equal outcomes.
"""

from __future__ import annotations

from heapq import heappop
from typing import cast

from lemix_common.errors import BadInput
from lemix_studies.simulator.cluster import Node, Stage
from lemix_studies.simulator.generations import Generations
from lemix_studies.simulator.idle import idle_times
from lemix_studies.simulator.jobs import bytes_of
from lemix_studies.simulator.placing import Placing
from lemix_studies.simulator.run import Run
from lemix_studies.simulator.scenario import Outcome, Record, Scenario
from lemix_studies.simulator.scores import Scores
from lemix_studies.simulator.stages import Stages
from lemix_studies.simulator.tenancy import Credit
from lemix_studies.simulator.trainings import Trainings


def simulate(scenario: Scenario) -> Outcome:
    """Let the scenario take its course; `BadInput` for what can't run at all, by memory or by its policy."""
    first = [works[0].arrived_at for works in (scenario.requests, scenario.training) if works]
    start = min(first, default=0.0)
    run = Run(scenario, _nodes(scenario, start), start)
    run.placing = Placing(run)
    run.stages = Stages(run)
    run.scores, run.trainings, run.generations = Scores(run), Trainings(run), Generations(run)
    _take_course(run)
    return _outcome(run, start)


def _take_course(run: Run) -> None:
    requests = run.scenario.requests
    arrivals = [*(work.arrived_at for work in requests), float("inf")]
    events, placing = run.events, run.placing
    placing.begin()
    arrived = 0
    next_arrival = arrivals[0]
    while run.num_left:
        if events[0][0] <= next_arrival:
            run.now, _, handler, subject, detail = heappop(events)
            handler(subject, detail)
            if run.is_changed:
                run.is_changed = False
                placing.ask_again()
        else:
            run.now = next_arrival
            placing.arrived(requests[arrived], arrived)
            arrived += 1
            next_arrival = arrivals[arrived]


def _nodes(scenario: Scenario, now: float) -> list[Node]:
    """Open, idle, and with what memory weights and training leave."""
    room = _room(scenario)
    nodes = []
    for number in range(scenario.nodes):
        node = Node(number, now, list(room))
        node.stages = [
            Stage(node, index, costs, Credit(scenario.min_training_share))
            for index, costs in enumerate(scenario.profile.stages)
        ]
        nodes.append(node)
    return nodes


def _room(scenario: Scenario) -> list[float]:
    """Bytes of each stage for what items hold; an item that never fits is a `BadInput`."""
    profile = scenario.profile
    if not scenario.checks_memory:
        return [float("inf")] * profile.num_stages
    training = bool(scenario.training)
    room = [
        float(profile.memory_bytes - stage.weight_bytes - training * stage.training_bytes)
        for stage in profile.stages
    ]
    if min(room) < 0:
        raise BadInput(f"{profile.model}: the weights of a stage, and what training them takes, don't fit it")
    for work in (*scenario.requests, *scenario.training):
        if work.kind == "score":
            continue
        for left, wanted in zip(
            room, bytes_of(work, profile, scenario.schedule, scenario.microbatches), strict=False
        ):
            if wanted > left:
                raise BadInput(
                    f"{work.item} ({work.tokens} tokens) needs {wanted / 1e9:.2f} GB on a stage that has "
                    f"{left / 1e9:.2f} GB beside its weights: it can never run"
                )
    return room


def _outcome(run: Run, start: float) -> Outcome:
    records = cast("list[Record]", run.records)
    end = max((record.ended_at for record in records), default=start)
    still = [(node.number, node.held_since, end) for node in run.nodes if node.is_open or node.is_closing]
    held = tuple(
        sorted((node, since, min(to, end)) for node, since, to in (*run.placing.held, *still) if since < end)
    )
    return Outcome(
        records=tuple(records),
        intervals=tuple(run.intervals),
        node_seconds=sum(to - since for _, since, to in held),
        held=tuple(span for span in held if span[1] < span[2]),
        paper_span_s=sum(node.last_end - node.first_start for node in run.nodes if node.first_start >= 0),
        began_at=start,
        duration_s=end - start,
        idle=idle_times(run.profile, run.scenario.requests),
    )
