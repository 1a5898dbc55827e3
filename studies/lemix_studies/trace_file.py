"""trace.json: pieces of the stages' time as Chrome and Perfetto show them, a process a node and a thread a stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lemix_common.errors import BadInput
from lemix_studies.pieces import CATEGORIES, Piece, Position
from lemix_studies.recordings import Recording

TRACE = "trace.json"
_MICROSECONDS = 1e6


def chrome_trace(recording: Recording) -> dict[str, object]:
    """The object of the file; what ran is kept beside the events."""
    return {
        "traceEvents": [*_names(recording.positions), *map(_event, recording.pieces)],
        "displayTimeUnit": "ms",
        "otherData": {"title": recording.title, "clock": recording.clock},
    }


def read_trace_file(path: Path) -> Recording:
    """The recording that a file was made from; `BadInput` for any other file."""
    try:
        written = json.loads(path.read_text("utf-8"))
        events = written["traceEvents"]
        threads = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        pieces = [_piece(event) for event in events if event["ph"] == "X" and event["cat"] in CATEGORIES]
        return Recording(
            pieces=pieces,
            positions=sorted(threads | {piece.position for piece in pieces}),
            title=str(written["otherData"]["title"]),
            clock=str(written["otherData"]["clock"]),
        )
    except OSError as error:
        raise BadInput(f"{path} can't be read ({error.strerror}): give the directory of a report") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is not the trace.json of a report ({type(error).__name__}: {error})"
        ) from None


def _names(positions: Iterable[Position]) -> Iterator[dict[str, object]]:
    ordered = sorted(positions)
    for node in sorted({node for node, _ in ordered}):
        yield _metadata("process_name", node, 0, {"name": f"node {node}"})
        yield _metadata("process_sort_index", node, 0, {"sort_index": node})
    for node, stage in ordered:
        yield _metadata("thread_name", node, stage, {"name": f"stage {stage}"})
        yield _metadata("thread_sort_index", node, stage, {"sort_index": stage})


def _metadata(name: str, node: int, stage: int, args: Mapping[str, object]) -> dict[str, object]:
    return {"ph": "M", "pid": node, "tid": stage, "name": name, "args": args}


def _event(piece: Piece) -> dict[str, object]:
    args: dict[str, object] = {"item": piece.item or None, "weights_version": piece.version or None}
    if piece.unit != piece.item:
        args["step"] = piece.unit
    if piece.worker:
        args["worker"] = piece.worker
    if piece.others:
        args |= {"others": list(piece.others), "more": piece.more}
    return {
        "ph": "X",
        "pid": piece.node,
        "tid": piece.stage,
        "cat": piece.category,
        "name": piece.category.replace("_", " "),
        "ts": round(_MICROSECONDS * piece.start, 1),
        "dur": round(_MICROSECONDS * piece.seconds, 1),
        "args": args,
    }


def _piece(event: Mapping[str, Any]) -> Piece:
    args = event["args"]
    start = event["ts"] / _MICROSECONDS
    item = args.get("item") or ""
    return Piece(
        node=int(event["pid"]),
        stage=int(event["tid"]),
        category=event["cat"],
        start=start,
        end=start + event["dur"] / _MICROSECONDS,
        worker=args.get("worker", ""),
        item=item,
        unit=args.get("step", item),
        version=args.get("weights_version") or "",
        others=tuple(args.get("others", ())),
        more=int(args.get("more", 0)),
    )
