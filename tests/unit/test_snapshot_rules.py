from __future__ import annotations

from typing import Any

import pytest

from lemix_coordinator.commands import (
    AdvanceOperation,
    ChooseWriters,
    ClearVersion,
    OpenSnapshot,
    RetireVersion,
)
from lemix_coordinator.coordinator import decide
from lemix_coordinator.snapshots import snapshots
from lemix_coordinator.view import OperationView
from unit.cluster_views import node_of, operation_of, run_of, view_of

TWO = (node_of(0, 4, 4), node_of(1, 4, 4, epoch=5))
CHECKPOINTED = {"checkpoint": 4}
WRITTEN: dict[str, Any] = {"writers": (0, 0), "epochs": (1, 1), "step": 4, "shards_written": 2}


@pytest.mark.parametrize(
    ("publish_every", "planned", "is_due"),
    [(1, 9, True), (2, 9, True), (3, 9, False), (3, 4, True)],
    ids=["every step", "two behind", "not yet", "nothing else is planned"],
)
def test_a_version_is_published_when_it_is_due(publish_every: int, planned: int, *, is_due: bool) -> None:
    """Every ``publish_every`` steps, and when nothing more is planned."""
    run = run_of(planned=planned, committed=4, published=2, **CHECKPOINTED)
    commands = list(snapshots(view_of(TWO, run, publish_every=publish_every)))
    expected = OpenSnapshot("publish", (0, 0), (1, 1), "2 committed steps are not served")
    assert commands == ([expected] if is_due else [])


def test_only_two_served_versions_live() -> None:
    """A third is begun only when the draining one is retired, and that when no item uses it."""
    run = run_of(planned=4, committed=4, published=3, **CHECKPOINTED)
    assert list(snapshots(view_of(TWO, run, draining="0.2", draining_in_flight=1))) == []
    assert list(snapshots(view_of(TWO, run, draining="0.2"))) == [RetireVersion("0.2")]


@pytest.mark.parametrize(
    ("drained_s", "behind", "operations", "is_due"),
    [
        (29.0, 1, [], False),
        (30.0, 1, [], True),
        (30.0, 0, [], False),
        (30.0, 0, [operation_of("rollback", "requested")], True),
        (30.0, 0, [operation_of("publish", "writing", **WRITTEN)], True),
        (30.0, 0, [operation_of("checkpoint", "requested", **WRITTEN)], False),
    ],
    ids=["not yet", "a publish", "nobody waits", "a rollback", "a publish that is written", "a checkpoint"],
)
def test_a_draining_version_is_cleared_when_another_has_waited(
    drained_s: float, behind: int, operations: list[OperationView], *, is_due: bool
) -> None:
    """After ``max_drain_s``, and only for one that waits; said once, and by nobody once no item uses it."""
    run = run_of(planned=4, committed=4, published=4 - behind, **CHECKPOINTED)
    about: dict[str, Any] = {"operations": operations, "draining": "0.2", "draining_for_s": drained_s}

    def clears(**more: Any) -> bool:
        return ClearVersion("0.2") in list(snapshots(view_of(TWO, run, max_drain_s=30.0, **(about | more))))

    assert clears(draining_in_flight=1) == is_due
    assert not clears(draining_in_flight=1, is_draining_cleared=True)
    assert not clears(draining_in_flight=0)


@pytest.mark.parametrize("planned", [4, 9], ids=["idle", "more is planned"])
def test_a_drain_that_divides_requests_is_cleared_all_the_same(planned: int) -> None:
    """What it costs puts off the next version; it doesn't let its last requests stay for longer."""
    run = run_of(planned=planned, committed=4, published=3, **CHECKPOINTED)
    about: dict[str, Any] = {"draining": "0.2", "draining_in_flight": 1, "draining_for_s": 30.0}
    view = view_of(TWO, run, max_drain_s=30.0, divided_s=30.0, **about)
    assert ClearVersion("0.2") in list(snapshots(view))


@pytest.mark.parametrize(
    ("undivided_s", "share", "planned", "is_due"),
    [
        (17.9, 0.1, 9, False),
        (18.1, 0.1, 9, True),
        (0.0, 1.0, 9, True),
        (1.9, 0.1, 4, False),
        (2.1, 0.1, 4, True),
    ],
    ids=["not yet", "a tenth of the time", "as soon as it can", "idle, not yet", "idle, half of the time"],
)
def test_drains_take_their_share_of_the_time_at_most(
    undivided_s: float, share: float, planned: int, *, is_due: bool
) -> None:
    """The last drain had requests of two versions take turns for 2 s."""
    run = run_of(planned=planned, committed=4, published=3, **CHECKPOINTED)
    view = view_of(TWO, run, divided_s=2.0, undivided_s=undivided_s, max_drain_share=share)
    opened = [each.kind for each in snapshots(view) if isinstance(each, OpenSnapshot)]
    assert ("publish" in opened) == is_due


def test_a_publish_that_a_rollback_overtook_waits_with_what_it_wrote() -> None:
    """Until the version that drains for the rollback is gone."""
    run = run_of(planned=4, committed=4, published=4, **CHECKPOINTED)
    written = [operation_of("publish", "writing", **WRITTEN)]
    assert list(snapshots(view_of(TWO, run, operations=written, draining="0.2", draining_in_flight=1))) == []
    advances = [AdvanceOperation("publish-1", "writing")]
    assert list(snapshots(view_of(TWO, run, operations=written))) == advances


def test_one_publish_at_a_time() -> None:
    """What is in progress is moved on, nothing is opened beside it."""
    run = run_of(planned=9, committed=4, published=2, **CHECKPOINTED)
    operation = operation_of("publish", "requested", writers=(0, 0), epochs=(1, 1))
    assert list(snapshots(view_of(TWO, run, operations=[operation]))) == [
        AdvanceOperation("publish-1", "requested")
    ]


def test_a_checkpoint_is_due_every_so_many_steps() -> None:
    """Counted from the last one."""
    run = run_of(planned=9, committed=4, published=4, checkpoint=1)
    assert list(snapshots(view_of(TWO, run, checkpoint_every=4))) == []
    assert list(snapshots(view_of(TWO, run, checkpoint_every=3))) == [
        OpenSnapshot("checkpoint", (0, 0), (1, 1), "the last checkpoint is of step 1")
    ]


def test_one_checkpoint_does_for_two_reasons() -> None:
    """A node needs the state in the same moment in which a checkpoint is due."""
    nodes = [node_of(0, 4, 4), node_of(1, None, None, epoch=5)]
    view = view_of(nodes, run_of(planned=9, committed=4, published=4, checkpoint=0), checkpoint_every=4)
    assert list(decide(view)) == [
        OpenSnapshot("checkpoint", (0, 0), (1, 1), "a node needs the training state")
    ]


def test_nothing_is_opened_while_nobody_has_the_committed_state() -> None:
    """It comes back by a replay first."""
    run = run_of(planned=9, committed=4, published=0, checkpoint=0)
    assert list(snapshots(view_of([node_of(0, 4, 3)], run, checkpoint_every=1))) == []


def test_an_operation_gets_writers_and_others_when_one_is_lost() -> None:
    """One that a client asked for has none yet; a writer in an older epoch will never write."""
    run = run_of(planned=4, committed=4, published=4, **CHECKPOINTED)
    asked = operation_of("checkpoint", "requested")
    assert list(snapshots(view_of(TWO, run, operations=[asked]))) == [
        ChooseWriters("checkpoint-1", "requested", (0, 0), (1, 1), "asked for")
    ]
    lost = operation_of("checkpoint", "writing", writers=(1, 1), epochs=(4, 4), shards_written=1)
    assert list(snapshots(view_of(TWO, run, operations=[lost]))) == [
        ChooseWriters("checkpoint-1", "writing", (0, 0), (1, 1), "a writer was lost")
    ]
    nobody = view_of([node_of(0, 3, 4), node_of(1, None, 4)], run, operations=[lost, asked])
    assert list(snapshots(nobody)) == []


def test_a_writer_that_was_left_behind_is_replaced() -> None:
    """Its node lost a stage and the others went on: it will never have the state that is to be written."""
    run = run_of(planned=4, committed=4, published=4, **CHECKPOINTED)
    nodes = [node_of(0, None, 3, epoch=2), node_of(1, 4, 4, epoch=5)]
    about = {"writers": (1, 0), "epochs": (5, 2)}
    chosen = ChooseWriters("checkpoint-1", "writing", (1, 1), (5, 5), "a writer was lost")
    behind = operation_of("checkpoint", "writing", step=4, **about)
    assert list(snapshots(view_of(nodes, run, operations=[behind]))) == [chosen]
    in_time = operation_of("checkpoint", "writing", step=3, **about)
    assert list(snapshots(view_of(nodes, run, operations=[in_time]))) == []
    not_begun = operation_of("checkpoint", "requested", **about)
    assert list(snapshots(view_of(nodes, run, operations=[not_begun]))) == [
        ChooseWriters("checkpoint-1", "requested", (1, 1), (5, 5), "a writer was lost")
    ]


def test_a_writer_that_went_on_has_written() -> None:
    """It took its copy before the next step's optimizer ran."""
    run = run_of(planned=9, committed=4, published=4, checkpoint=3)
    operation = operation_of("checkpoint", "writing", writers=(0, 0), epochs=(1, 1), step=3, shards_written=1)
    assert list(snapshots(view_of(TWO, run, operations=[operation]))) == []


@pytest.mark.parametrize(
    ("state", "shards_written", "stages_prepared", "moves"),
    [
        ("writing", 1, 0, False),
        ("writing", 2, 0, True),
        ("preparing", 2, 3, False),
        ("preparing", 2, 4, True),
    ],
)
def test_a_transition_is_asked_for_when_its_reports_are_there(
    state: str, shards_written: int, stages_prepared: int, *, moves: bool
) -> None:
    """All shards written; the version prepared on every stage of every ready node."""
    run = run_of(planned=4, committed=4, published=3, **CHECKPOINTED)
    operation = operation_of(
        "publish",
        state,
        writers=(0, 0),
        epochs=(1, 1),
        shards_written=shards_written,
        stages_prepared=stages_prepared,
    )
    commands = list(snapshots(view_of(TWO, run, operations=[operation])))
    assert commands == ([AdvanceOperation("publish-1", state)] if moves else [])


def test_a_node_that_is_down_does_not_hold_a_publish_up() -> None:
    """It loads what is served when it comes back."""
    run = run_of(planned=4, committed=4, published=3, **CHECKPOINTED)
    operation = operation_of("publish", "preparing", writers=(0, 0), epochs=(1, 1), stages_prepared=2)
    nodes = [TWO[0], node_of(1, None, 4, epoch=5, ready=False)]
    assert list(snapshots(view_of(nodes, run, operations=[operation]))) == [
        AdvanceOperation("publish-1", "preparing")
    ]
    nobody = [node_of(0, 4, 4, ready=False), nodes[1]]
    assert list(snapshots(view_of(nobody, run, operations=[operation]))) == []


def test_a_rollback_waits_for_the_draining_version() -> None:
    """No stage holds more than two served versions and one to come; meanwhile nothing else is published."""
    run = run_of(planned=9, committed=4, published=2, **CHECKPOINTED)
    asked = operation_of("rollback", "requested")
    assert list(snapshots(view_of(TWO, run, operations=[asked], draining="0.1", draining_in_flight=1))) == []
    assert list(snapshots(view_of(TWO, run, operations=[asked]))) == [
        AdvanceOperation("rollback-1", "requested")
    ]


def test_a_rollback_needs_no_writers() -> None:
    """Nobody has to have the committed state: it is what is left."""
    lost = [node_of(0, None, None)]
    run = run_of(planned=9, committed=4, published=2, **CHECKPOINTED)
    preparing = operation_of("rollback", "preparing", step=4, stages_prepared=2)
    assert list(snapshots(view_of(lost, run, operations=[preparing]))) == [
        AdvanceOperation("rollback-1", "preparing")
    ]


def test_a_version_that_was_held_back_is_not_judged_again() -> None:
    """Only a later step makes another one."""
    run = run_of(planned=4, committed=4, published=2, held_back=4, **CHECKPOINTED)
    assert list(snapshots(view_of(TWO, run))) == []
    run = run_of(planned=5, committed=5, published=2, held_back=4, checkpoint=4)
    nodes = (node_of(0, 5, 5), node_of(1, 5, 5))
    assert [type(command) for command in snapshots(view_of(nodes, run))] == [OpenSnapshot]


@pytest.mark.parametrize(("items_left", "moves"), [(1, False), (0, True)])
def test_a_version_is_judged_when_everything_is_scored(items_left: int, *, moves: bool) -> None:
    """Then an operations worker decides."""
    run = run_of(planned=4, committed=4, published=3, **CHECKPOINTED)
    judging = operation_of("publish", "judging", writers=(0, 0), epochs=(1, 1), items_left=items_left)
    commands = list(snapshots(view_of(TWO, run, operations=[judging])))
    assert commands == ([AdvanceOperation("publish-1", "judging")] if moves else [])
