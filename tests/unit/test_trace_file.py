from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lemix_common.errors import BadInput
from lemix_studies.pieces import Piece
from lemix_studies.recordings import Recording
from lemix_studies.trace_file import chrome_trace, read_trace_file
from stage_rows import drawn

IDLE = Piece(node=1, stage=0, category="idle_serving", start=0.0, end=2.25)
SHARED = replace(drawn("1")[0], others=("r-2", "r-3"), more=4)
"""An iteration of seven requests."""
RECORDING = Recording(
    pieces=[*drawn("1a#"), IDLE, SHARED], positions=[(0, 0), (1, 0)], title="a run", clock="seconds since"
)


def test_events_are_chromes() -> None:
    """A process a node, a thread a stage, microseconds, and what INTERFACES promises of an event."""
    trace: dict[str, list[dict[str, object]]] = json.loads(json.dumps(chrome_trace(RECORDING)))
    events = trace["traceEvents"]
    assert [(event["name"], event["pid"], event["tid"], event["args"]) for event in events[:8]] == [
        ("process_name", 0, 0, {"name": "node 0"}),
        ("process_sort_index", 0, 0, {"sort_index": 0}),
        ("process_name", 1, 0, {"name": "node 1"}),
        ("process_sort_index", 1, 0, {"sort_index": 1}),
        ("thread_name", 0, 0, {"name": "stage 0"}),
        ("thread_sort_index", 0, 0, {"sort_index": 0}),
        ("thread_name", 1, 0, {"name": "stage 0"}),
        ("thread_sort_index", 1, 0, {"sort_index": 0}),
    ]
    assert events[9] == {
        "ph": "X", "pid": 0, "tid": 0, "cat": "training_forward", "name": "training forward", "ts": 1e6, "dur": 1e6,
        "args": {"item": "t-a", "weights_version": "0.0", "step": "main:1", "worker": "worker-0-0"},
    }  # fmt: skip
    assert events[11] == {
        "ph": "X", "pid": 1, "tid": 0, "cat": "idle_serving", "name": "idle serving", "ts": 0.0, "dur": 2.25e6,
        "args": {"item": None, "weights_version": None},
    }  # fmt: skip


def test_a_trace_file_can_be_read_back(tmp_path: Path) -> None:
    """All that a picture needs."""
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(chrome_trace(RECORDING)))
    assert read_trace_file(file) == RECORDING


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't be read (No such file or directory): give the directory of a report"),
        ("[", "is not the trace.json of a report"),
        ("[]", "is not the trace.json of a report"),
        ('{"traceEvents": [{"ph": "X"}]}', "is not the trace.json of a report (KeyError: 'cat')"),
        ('{"traceEvents": []}', "is not the trace.json of a report (KeyError: 'otherData')"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    """The message names the file."""
    file = tmp_path / "trace.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput) as refused:
        read_trace_file(file)
    assert str(refused.value).startswith(str(file))
    assert reason in str(refused.value)
