from __future__ import annotations

import io
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from integration.places import Place, Reopening
from integration.scripted_worker import BYTES_TOKENIZER, MODEL, SPAN_S, ScriptedWorker
from lemix import Client
from lemix.connection import connection_over
from lemix_common.broker import Broker
from lemix_common.store.cluster import Cluster
from lemix_studies.history import History
from lemix_studies.replay import Outcome, Replay, run_replay
from lemix_studies.report import report_directory, summary_of, write_report
from lemix_studies.texts import Texts
from lemix_studies.traces import TraceLine
from lemix_studies.workload import PlannedArrival, WorkloadOptions, plan_workload

OPTIONS = WorkloadOptions(train_every=4, time_scale=0.01, length_scale=0.5)
TRACE = [TraceLine(float(k), 10, 6 + k % 5) for k in range(22)]
TEXTS = Texts(("a long tale of training. " * 9,) * 4, ("something quite unseen! " * 9,) * 2)


def plan(options: WorkloadOptions = OPTIONS) -> list[PlannedArrival]:
    """A small workload of generations and examples."""
    encode = Tokenizer.from_str(BYTES_TOKENIZER).encode
    return plan_workload(TRACE, TEXTS, lambda text: encode(text).ids, options, context_length=64)


@pytest.fixture
def outcome(broker: Broker, worker: ScriptedWorker) -> Outcome:
    """What a replay of the workload saw."""
    with worker.runs():
        return run_replay(connection_over(broker), plan(), io.StringIO(), prefix="r", data_dir=None)


def test_every_item_has_one_end(outcome: Outcome, tmp_path: Path) -> None:
    """All is done, nothing lost, nothing twice, and the probes of the idle cluster are not counted."""
    summary = summary_of(outcome, OPTIONS, tmp_path)
    counts = (
        "submitted",
        "done",
        "failed",
        "cancelled",
        "refused",
        "lost",
        "duplicated",
        "dead_lettered",
        "capped",
    )
    assert {name: summary[name] for name in counts} == {
        "submitted": 22, "done": 22, "failed": 0, "cancelled": 0, "refused": 0, "lost": 0, "duplicated": 0,
        "dead_lettered": 0, "capped": 0,
    }  # fmt: skip


def test_examples_are_in_steps_in_trace_order(outcome: Outcome) -> None:
    """Each example is in one committed step, in the order of the trace."""
    assert [item for step in outcome.steps for item in step.items] == [f"r-{k:06d}" for k in range(0, 22, 4)]
    assert [step.weights_version for step in outcome.steps] == ["0.1", "0.2", "0.3"]


def test_a_request_generates_the_traces_number_of_tokens(outcome: Outcome) -> None:
    """Each token's event is there once."""
    for item in outcome.items:
        if item.kind == "generate":
            assert item.token_indexes == list(range(len(outcome.arrivals[item.item].reference)))


def test_a_report_has_its_files(outcome: Outcome, tmp_path: Path) -> None:
    """The files of INTERFACES, each readable."""
    directory = report_directory(tmp_path / "report", "replay")
    write_report(directory, outcome, summary_of(outcome, OPTIONS, directory))
    assert json.loads((directory / "summary.json").read_text())["done"] == 22
    steps = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    assert [step["run_id"] for step in steps] == ["main"] * 3
    assert len((directory / "items.csv").read_text().splitlines()) == 23
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and not event["cat"].startswith("idle")]
    assert {(span["pid"], span["tid"], span["cat"]) for span in spans} == {(0, 0, "prefill")}
    assert "<table>" in (directory / "report.html").read_text()


def test_the_slo_base_is_what_the_stages_took(outcome: Outcome) -> None:
    """On the idle cluster, whatever the client's own way to it took."""
    assert outcome.idle.slo_base_s == pytest.approx(SPAN_S)
    assert outcome.idle.ttft_s > 0


def test_the_history_is_written_as_it_happens(broker: Broker, worker: ScriptedWorker) -> None:
    """One line an event, submitted first, each naming client, item and kind."""
    written = io.StringIO()
    with worker.runs():
        run_replay(connection_over(broker), plan(), written, prefix="r", data_dir=None)
    events = [json.loads(line) for line in written.getvalue().splitlines()]
    counted = Counter(event["event"] for event in events)
    assert (counted["submitted"], counted["accepted"], counted["done"]) == (22, 22, 22)
    assert {event["client"] for event in events} == {events[0]["client"]}
    assert all(
        event["result_sha256"] and event["weights_version"] for event in events if event["event"] == "done"
    )


class SignalsHalfway(io.StringIO):
    """A history file that says when its hundredth line is written."""

    def __init__(self) -> None:
        super().__init__()
        self.is_halfway = threading.Event()
        self.num_lines = 0

    def write(self, text: str) -> int:
        """Write a line down."""
        self.num_lines += 1
        if self.num_lines == 100:
            self.is_halfway.set()
        return super().write(text)


def test_a_broker_restart_loses_and_doubles_nothing(
    place: Place, worker: ScriptedWorker, tmp_path: Path
) -> None:
    """Items that are due meanwhile are accepted once, in the trace's order."""
    history = SignalsHalfway()
    with worker.runs(), ThreadPoolExecutor(1) as pool:
        replaying = pool.submit(
            run_replay, connection_over(place.broker), plan(), history, prefix="r", data_dir=None
        )
        assert history.is_halfway.wait(20)
        place.outage.begin()
        place.outage.end()
        outcome = replaying.result()
    summary = summary_of(outcome, OPTIONS, tmp_path)
    assert [summary[name] for name in ("done", "lost", "duplicated")] == [22, 0, 0]
    assert [item for step in outcome.steps for item in step.items] == [f"r-{k:06d}" for k in range(0, 22, 4)]


def test_a_cluster_that_closes_for_a_while_loses_nothing(broker: Broker, worker: ScriptedWorker) -> None:
    """As while a coordinator's container is replaced: the item that is due, and the flush, are asked for again."""
    cluster, settings = Cluster(broker), Cluster(broker).settings()

    def reopen() -> None:
        cluster.create(settings, MODEL, BYTES_TOKENIZER)
        if history.events[-1].event == "accepted":
            worker.work()

    clock = broker.clock = Reopening(reopen)
    example = next(arrival for arrival in plan() if arrival.kind == "train")
    with Client(connection=connection_over(broker)) as client:
        history = History(io.StringIO(), clock.now, client=client.name)
        replay = Replay(client, broker, history, [example], "r")
        cluster.stop_accepting()
        replay.submit_all()
        assert ([event.event for event in history.events], clock.num_sleeps) == (["submitted", "accepted"], 1)
        cluster.stop_accepting()
        replay.finish()
        assert clock.num_sleeps == 2
        (answer,) = replay.answers().values()
    assert answer.step == 1
