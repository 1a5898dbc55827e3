from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import structlog
import typer
from structlog.testing import capture_logs
from typer.testing import CliRunner

from integration.places import Place
from integration.scripted_worker import NAME, ScriptedWorker
from lemix import Score
from lemix_common.broker import Broker
from lemix_common.server import RunningBroker
from lemix_studies import pictures
from lemix_studies.measures import IdleTimes, ItemTimes
from lemix_studies.pictures.timeline import MOST_NODES, timeline_picture
from lemix_studies.recordings import Recording
from lemix_studies.replay import CommittedStep, Outcome
from lemix_studies.report import report_directory, summary_of, write_report
from lemix_studies.spans import Span, recent_spans
from lemix_studies.timeline_cli import register
from lemix_studies.workload import PlannedArrival, WorkloadOptions
from stage_rows import drawn

ZERO = 1000.0
FILES = {
    "history.jsonl", "items.csv", "latency.png", "loss.png", "report.html", "steps.jsonl", "summary.json",
    "timeline.png", "timeline.svg", "trace.json",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"
SVG_TEXT = "{http://www.w3.org/2000/svg}text"


def span(stage: int, category: str, item: str, start: float, seconds: float = 1.0) -> Span:
    """As a worker reports it; times count from the first submission."""
    known = {
        "node": 0,
        "stage": stage,
        "worker": f"w{stage}",
        "cat": category,
        "item": item,
        "version": "0.0",
    }
    return {**known, "start": ZERO + start, "end": ZERO + start + seconds, "blocked_s": 0.0}


SPANS = [
    span(0, "prefill", "probe-1", -5),
    span(0, "prefill", "r-12", 0),
    span(1, "prefill", "r-12", 1),
    span(0, "training_forward", "main:1:0", 2),
    span(1, "training_forward", "main:1:0", 3),
    span(1, "training_backward", "main:1:0", 4, 2),
    span(0, "training_backward", "main:1:0", 6, 2),
    span(0, "optimizer", "main:1", 8.5, 0.5),
    span(1, "optimizer", "main:1", 8.5, 0.5),
]


def item(name: str, kind: str, submitted: float, ended: float) -> ItemTimes:
    """One that was done."""
    return ItemTimes(
        item=name,
        kind=kind,
        submitted=ZERO + submitted,
        accepted=ZERO + submitted,
        ends=["done"],
        ended=ZERO + ended,
        weights_version="0.0",
    )


@pytest.fixture
def outcome() -> Outcome:
    """A request that was scored and an example that was learned, on one of two nodes."""
    return Outcome(
        arrivals={
            "r-12": PlannedArrival(
                line=1, at_s=0, kind="score", prompt=(1,), reference=(2,), is_capped=False
            ),
            "r-4": PlannedArrival(line=4, at_s=1, kind="train", prompt=(1,), reference=(2,), is_capped=False),
        },
        items=[item("r-12", "score", 0, 2), item("r-4", "train", 1, 9)],
        answers={"r-12": Score(1.5, (-1.5,), "0.0")},
        steps=[CommittedStep(run_id="main", step=1, items=("r-4",), weights_version="0.1", loss=2.5)],
        spans=list(SPANS),
        idle=IdleTimes(slo_base_s=2.0, ttft_s=0.0, itl_s=0.0),
        nodes=2,
        dead_lettered=0,
        max_lateness_s=0.0,
        weights_sha256={},
        policy="separate",
    )


@pytest.fixture
def write(outcome: Outcome, tmp_path: Path) -> Callable[[], Path]:
    """Writes the report, in whose directory nothing else is."""

    def written() -> Path:
        directory = report_directory(tmp_path / "report", "replay")
        write_report(directory, outcome, summary_of(outcome, WorkloadOptions(), directory))
        return directory

    return written


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up logging for its own process."""
    yield
    structlog.reset_defaults()


def timeline(*options: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `lemix timeline`."""
    app = typer.Typer()
    register(app)
    ran = CliRunner().invoke(app, options)
    return ran.exit_code, ran.stdout, ran.stderr


def texts(svg: bytes) -> list[str]:
    """Every text in an SVG picture."""
    return [element.text or "" for element in ET.fromstring(svg).iter(SVG_TEXT)]


def test_a_report_has_every_file(write: Callable[[], Path]) -> None:
    """And no other; pictures are pictures."""
    directory = write()
    assert {file.name for file in directory.iterdir()} == FILES
    for name in ("timeline.png", "loss.png", "latency.png"):
        assert (directory / name).read_bytes().startswith(PNG), name
        assert 10_000 < (directory / name).stat().st_size < 150_000, name


def test_the_trace_has_work_and_idleness_since_the_first_submission(write: Callable[[], Path]) -> None:
    """What measured the idle cluster before is left out, examples have their own names."""
    events = json.loads((write() / "trace.json").read_text())["traceEvents"]
    shown = [
        (
            event["pid"],
            event["tid"],
            event["cat"],
            event["args"]["item"],
            event["ts"] / 1e6,
            event["dur"] / 1e6,
        )
        for event in events
        if event["ph"] == "X"
    ]
    assert sorted(shown, key=lambda event: (*event[:2], event[4])) == [
        (0, 0, "prefill", "r-12", 0, 1),
        (0, 0, "idle_serving", None, 1, 1),
        (0, 0, "training_forward", "r-4", 2, 1),
        (0, 0, "idle_pipeline", None, 3, 3),
        (0, 0, "training_backward", "r-4", 6, 2),
        (0, 0, "idle_pipeline", None, 8, 0.5),
        (0, 0, "optimizer", "main:1", 8.5, 0.5),
        (0, 1, "idle_pipeline", None, 0, 1),
        (0, 1, "prefill", "r-12", 1, 1),
        (0, 1, "idle_pipeline", None, 2, 1),
        (0, 1, "training_forward", "r-4", 3, 1),
        (0, 1, "training_backward", "r-4", 4, 2),
        (0, 1, "idle_pipeline", None, 6, 2.5),
        (0, 1, "optimizer", "main:1", 8.5, 0.5),
        (1, 0, "idle_serving", None, 0, 9),
        (1, 1, "idle_serving", None, 0, 9),
    ]


def test_the_timeline_names_what_it_shows(write: Callable[[], Path]) -> None:
    """Title, nodes and what they do, stages, items with a prime where they are trained, and a legend."""
    shown = texts((write() / "timeline.svg").read_bytes())
    expected = {
        "lemix replay · separate", "node 0", "serves and trains", "node 1", "idle", "stage 0", "stage 1", "12", "4'",
        "busy 50% · serving idle 6% · pipeline idle 44%", "seconds since the first submission", "inference",
        "training, forward", "training, backward", "optimizer", "serving idle: nothing to do",
        "pipeline idle: waiting for a neighbour",
    }  # fmt: skip
    assert expected <= set(shown)
    assert (shown.count("12"), shown.count("4'")) == (2, 4)


def test_the_page_shows_the_pictures(write: Callable[[], Path]) -> None:
    """All three, from within the file."""
    page = (write() / "report.html").read_text()
    assert re.findall(r'<img alt="(\S+)" src="data:image/png;base64,iVBOR', page) == [
        "timeline.png",
        "loss.png",
        "latency.png",
    ]


def test_without_matplotlib_the_rest_is_written(
    write: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page and the log say what to install; pictures of an older report don't stay."""
    write()
    monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    with capture_logs() as logs:
        directory = write()
    reason = "pictures need matplotlib: pip install 'lemix[studies]'"
    assert {file.name for file in directory.iterdir()} == {
        name for name in FILES if not name.endswith((".png", ".svg"))
    }
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("report_without_pictures", reason)]
    assert (
        "Without pictures: pictures need matplotlib: pip install &#x27;lemix[studies]&#x27;."
        in (directory / "report.html").read_text()
    )
    assert timeline("--report", str(directory)) == (2, "", f"lemix: {reason}\n")


def test_a_run_without_work_has_a_report(outcome: Outcome, tmp_path: Path) -> None:
    """Without a timeline."""
    outcome.spans.clear()
    outcome.items.clear()
    outcome.answers.clear()
    outcome.steps.clear()
    directory = report_directory(tmp_path / "report", "replay")
    write_report(directory, outcome, summary_of(outcome, WorkloadOptions(), directory))
    assert {file.name for file in directory.iterdir()} == FILES - {"timeline.png", "timeline.svg"}


def test_any_window_of_a_report_can_be_drawn(write: Callable[[], Path], tmp_path: Path) -> None:
    """Of some nodes, as SVG by option or by the file's name; where and when is said."""
    directory, file = write(), tmp_path / "window.svg"
    said = timeline("--report", str(directory), "--from", "2", "--to", "6", "--node", "0", "-o", str(file))
    assert said == (0, f"{file}: 2 to 6 seconds since the first submission\n", "")
    shown = texts(file.read_bytes())
    assert "node 0" in shown
    assert not {"node 1", "12"} & set(shown)
    by_option = tmp_path / "window"
    timeline(
        "--report", str(directory), "--from", "2", "--to", "6", "--node", "0", "--svg", "-o", str(by_option)
    )
    assert by_option.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--node", "7"], "there is no node 7"),
        (["--from", "20"], "there is nothing to draw between 20 and"),
        (
            ["--url", "redis://127.0.0.1:1"],
            "give --report to draw a report, or --url to draw a cluster, not both",
        ),
        (["-o", "/nothing/here.png"], "/nothing/here.png can't be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    write: Callable[[], Path], options: Sequence[str], reason: str
) -> None:
    """One clear line, status 2."""
    status, _, error = timeline("--report", str(write()), *options)
    assert (status, error.count("\n")) == (2, 1)
    assert reason in error


def test_a_large_cluster_shows_its_first_nodes() -> None:
    """And says that there are more."""
    num_nodes = MOST_NODES + 2
    pieces = [piece for node in range(num_nodes) for piece in drawn("12", node=node)]
    recording = Recording(pieces=pieces, positions=[(node, 0) for node in range(num_nodes)], title="large")
    shown = texts(timeline_picture(recording, (0.0, 2.0), form="svg"))
    assert f"large · {MOST_NODES} of {num_nodes} nodes" in shown
    assert f"node {MOST_NODES}" not in shown


def report_spans(broker: Broker, *batches: Sequence[Span]) -> None:
    """As the workers do."""
    for batch in batches:
        broker.client.xadd(broker.keys.events, {"spans": json.dumps(batch)})


def test_recent_work_is_read_from_the_newest_on(broker: Broker) -> None:
    """As many seconds as are wanted, or all; in the stream's order, a batch at a time."""
    batches = [[span(0, "decode", str(number), number)] for number in range(500)]
    report_spans(broker, *batches)
    assert [known["item"] for known in recent_spans(broker, None)] == [str(number) for number in range(500)]
    assert [known["item"] for known in recent_spans(broker, 100)] == [
        str(number) for number in range(300, 500)
    ]


@pytest.mark.parametrize("place", ["server"], indirect=True)
def test_a_cluster_that_runs_can_be_drawn(
    place: Place,
    server: RunningBroker,
    worker: ScriptedWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From what its events stream still has; before any work that is said."""
    assert worker.is_placed
    monkeypatch.setenv("LEMIX_CLUSTER", "test")
    broker, file = place.broker, tmp_path / "live.svg"
    live = ["--url", server.url, "-o", str(file)]
    assert timeline(*live) == (2, "", "lemix: there is nothing to draw yet: no stage has reported any work\n")
    broker.client.hset(broker.keys.step("main", 1), "items", '["e-8"]')
    report_spans(broker, [{**known, "stage": 0, "worker": NAME} for known in SPANS[1:4]])
    assert timeline(*live) == (0, f"{file}: 0 to 3 seconds since 1970-01-01 00:16:40.000 UTC\n", "")
    assert {"naive-mix", "node 0", "stage 0", "12", "8'"} <= set(texts(file.read_bytes()))
