"""What `lemix top` and `lemix status` make of a status."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from lemix.cli.status_table import item_table, status_tables
from lemix.status import NodeStatus, QueueStatus, StageStatus, Status, WorkerStatus
from lemix.top import Sight, bar, frame, recent_tax, summary

WORKER = "worker-0-0123ab"


def status(*, stages: int = 2, done: float = 10, blocked_s: float = 1.0, response_s: float = 11.0) -> Status:
    """A cluster of one node."""
    busy = {"decode": 0.25, "training_forward": 0.5}
    return Status(
        cluster="lemix",
        state="running",
        leader="coordinator-1-abc",
        leader_epoch=3,
        nodes=[
            NodeStatus(
                node=0,
                state="ready",
                placement_epoch=7,
                stages=[
                    StageStatus(
                        stage=stage,
                        worker=WORKER,
                        layers=[stage, stage],
                        weights_version="0.4",
                        training_step=4,
                        busy=busy,
                        memory_used_bytes=2**20,
                        memory_budget_bytes=0,
                    )
                    for stage in range(stages)
                ],
            )
        ],
        workers=[
            WorkerStatus(
                worker=WORKER,
                pid=17,
                host="here",
                device="cpu",
                address="unix:/x",
                heartbeat_age_s=age,
                memory_used_bytes=300 * 2**20,
                memory_limit_bytes=2**30,
                links={"worker-1-aaaaaa": "shm", "worker-2-bbbbbb": "shm"},
            )
            for age in (0.5, None)
        ],
        queues={"work:0": QueueStatus(depth=3, pending=2, oldest_age_s=1.25, held_by={f"{WORKER}:7": 2})},
        dead_letters=1,
        failures=[{"item": "broken", "reason": "because", "at": 0.0}],
        training_tax=blocked_s / (response_s - blocked_s),
        slo_attainment=None,
        weights_version="0.4",
        versions={"served": "0.4", "draining": "0.3"},
        training={"planned": 6, "committed": 5, "published": 4, "checkpoint": 0},
        warnings=[],
        training_refused="",
        totals={"done": done, "open": 2, "failed": 1, "blocked_s": blocked_s, "response_s": response_s},
        metrics={"worker-0": "http://127.0.0.1:1/metrics"},
    )


def shown(*parts: RenderableType, width: int = 80) -> str:
    """As a terminal shows it, without colours."""
    out = StringIO()
    Console(file=out, width=width).print(*parts)
    return out.getvalue()


def test_a_frame_says_everything() -> None:
    """Leader, version, steps, items, tax, each stage with its worker, queues with who took what, the last failure."""
    text = shown(frame(Sight(0.0, status())))
    for part in (
        *("coordinator-1-abc, epoch 3", "1 alive, 1 silent", "0.4 is served, 0.3 is draining"),
        *("6 planned, 5 committed, 4 published", "10 done, 2 open, 1 failed", "10.0% since the start"),
        *("0 ready", "epoch 7", f"1 {WORKER}", "75%", f"{WORKER}:7 2", "broken: because", "q or Ctrl-C"),
    ):
        assert part in text


def test_training_that_stands_still_is_said() -> None:
    """With the reason, which says what to do."""
    diverging: Status = {**status(), "warnings": ["replicas are independent"]}
    assert "warning: replicas are independent" in summary(diverging)
    refused: Status = {**status(), "training_refused": "weights-000 was changed: bring it back"}
    assert "training stands still: weights-000 was changed: bring it back" in shown(*status_tables(refused))
    assert "stands still" not in shown(*status_tables(status()))


def test_rates_are_of_the_time_between() -> None:
    """Items a second, and the training tax of the last seconds beside that since the start."""
    earlier, now = status(), status(done=30, blocked_s=3.0, response_s=15.0)
    text = shown(frame(Sight(10.0, now), Sight(5.0, earlier)))
    assert "30 done (4.0/s)" in text
    assert "25.0% since the start, 100.0% now" in text
    assert recent_tax(earlier["totals"], earlier["totals"]) == 0.0


@pytest.mark.parametrize("stages", [1, 3, 8])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_stage_fits(stages: int, width: int) -> None:
    """Whatever the terminal's width, every stage is there with its worker's whole name."""
    text = shown(frame(Sight(0.0, status(stages=stages)), width=width), width=width)
    assert text.count(WORKER) == stages + 1, "the stages, and who took the queue's items"
    assert "…" not in text


def test_a_bar_is_as_long_as_its_cells() -> None:
    """Kinds in their order, the rest idle; rounding adds and loses nothing."""
    assert bar({}, 4).plain == "····"
    assert bar({"decode": 0.5}, 4).plain == "██··"
    assert bar({"optimizer": 0.33, "decode": 0.33, "prefill": 0.33}, 10).plain == "██████████"
    assert bar({"decode": 1.7}, 4).plain == "████"


def test_a_status_fits_a_small_terminal() -> None:
    """Tables of 80 columns cut no name off."""
    text = shown(*status_tables(status()))
    for part in (
        WORKER,
        "0.5 s ago",
        "silent",
        "300 of 1024 MiB",
        "shm",
        "25%",
        "50%",
        "because",
        "/metrics",
    ):
        assert part in text
    assert "…" not in text
    assert all(line in text for line in summary(status()))


def test_an_items_moments_are_readable() -> None:
    """Seconds since 1970 are shown as date and time."""
    text = shown(item_table("x", {"state": "done", "ended_at": "86400.5"}))
    assert "1970-01-02 00:00:00.500" in text
    assert "done" in text
