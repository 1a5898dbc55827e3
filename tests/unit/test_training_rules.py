from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix_common.store.training import RunState
from lemix_coordinator.commands import ForgetSteps, LoadTraining, OpenSnapshot, StartStep
from lemix_coordinator.training import forget, train, writers_at
from unit.cluster_views import node_of, operation_of, run_of, view_of


def started(step: int, attempt: int, members: list[int], epochs: list[int], **fields: int) -> RunState:
    """A run with an attempt in flight."""
    return run_of(
        planned=9,
        committed=step - 1,
        attempt=attempt,
        attempt_step=step,
        concluded=attempt - 1,
        members=members,
        epochs=epochs,
        **fields,
    )


def test_the_next_planned_step_runs_on_every_ready_node() -> None:
    """With all of them at the committed step."""
    view = view_of([node_of(0, 4, 4), node_of(1, 4, 4, epoch=7)], run_of(planned=6, committed=4))
    assert list(train(view)) == [StartStep(5, (0, 1), (1, 7), "next")]


def test_a_node_that_is_not_ready_is_left_out() -> None:
    """The others don't wait for it."""
    view = view_of([node_of(0, 4), node_of(1, 4, ready=False)], run_of(planned=6, committed=4))
    assert list(train(view)) == [StartStep(5, (0,), (1,), "next")]


@pytest.mark.parametrize(
    "view",
    [
        view_of([node_of(0, 4)], run_of(planned=4, committed=4)),
        view_of([node_of(0, 4)], run_of(planned=5, committed=4), is_stopping=True),
        view_of([node_of(0, 4, ready=False)], run_of(planned=5, committed=4)),
        view_of([node_of(0, 4)], started(5, 3, [0], [1])),
    ],
    ids=["nothing is planned", "the cluster stops", "no node is ready", "an attempt is in flight"],
)
def test_nothing_begins_when(view: object) -> None:
    """A step begins only if it can and must."""
    assert list(train(view)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recent_tax", "limit", "goes_on"), [(0.2, 0, True), (0.2, 0.1, False), (0.05, 0.1, True)]
)
def test_a_step_waits_while_training_costs_too_much(
    recent_tax: float, limit: float, *, goes_on: bool
) -> None:
    """Also one that would overlap with the last; a replay doesn't, since nobody has the committed state without it."""
    bounded: dict[str, Any] = {"recent_tax": recent_tax, "max_training_tax": limit}
    view = view_of([node_of(0, 4)], run_of(planned=6, committed=4), **bounded)
    assert bool(list(train(view))) == goes_on
    late: dict[str, Any] = {"schedule": "a-pp", "step_examples": 8}
    view = view_of([node_of(0, 4)], started(5, 3, [0], [1]), **bounded, **late)
    assert bool(list(train(view))) == goes_on
    replayed = run_of(planned=6, committed=4, checkpoint=2)
    assert list(train(view_of([node_of(0, 3)], replayed, **bounded)))


def test_only_training_nodes_train() -> None:
    """With `separate` the serving nodes are no members, and lack nothing."""
    view = view_of([node_of(0, None), node_of(1, 4)], run_of(planned=5, committed=4), policy="separate")
    assert list(train(view)) == [StartStep(5, (1,), (1,), "next")]


def test_a_lost_member_means_another_attempt() -> None:
    """Its node is in a newer epoch, or not ready: the step begins again with who is there."""
    run = started(5, 3, [0, 1], [1, 1])
    moved = view_of([node_of(0, 4), node_of(1, 4, epoch=2)], run)
    assert list(train(moved)) == [StartStep(5, (0, 1), (1, 2), "another attempt")]
    gone = view_of([node_of(0, 4), node_of(1, 4, ready=False)], run)
    assert list(train(gone)) == [StartStep(5, (0,), (1,), "another attempt")]


def test_an_attempt_at_a_step_that_its_member_has_already_is_none() -> None:
    """A replay begun before a committed step's optimizer had reported would never end: it isn't waited for."""
    run = run_of(
        planned=6, committed=5, attempt=3, attempt_step=5, concluded=2, members=[0], epochs=[2], checkpoint=3
    )
    assert list(train(view_of([node_of(0, 5, epoch=2)], run))) == [
        StartStep(6, (0,), (2,), "another attempt")
    ]
    assert list(train(view_of([node_of(0, 4, epoch=2)], run))) == []


def test_a_node_without_the_state_gets_it_from_a_living_one() -> None:
    """First a checkpoint of the committed step, written by whoever has each stage; then the node loads it."""
    nodes = [node_of(0, 4, 4), node_of(1, 4, None, epoch=3)]
    view = view_of(nodes, run_of(planned=6, committed=4, checkpoint=2))
    assert list(train(view)) == [
        OpenSnapshot("checkpoint", (0, 0), (1, 1), "a node needs the training state")
    ]
    writing = view_of(
        nodes,
        run_of(planned=6, committed=4, checkpoint=2),
        operations=[operation_of("checkpoint", "writing")],
    )
    assert list(train(writing)) == []
    sealed = view_of(nodes, run_of(planned=6, committed=4, checkpoint=4, checkpoint_directory="/c/0.4"))
    assert list(train(sealed)) == [
        LoadTraining(4, "/c/0.4", (1,), (3,), "these nodes lack the committed state")
    ]


def test_stages_of_different_nodes_can_give_the_state_together() -> None:
    """Each node has lost another stage: together they still have all."""
    view = view_of([node_of(0, 4, None), node_of(1, None, 4)], run_of(planned=6, committed=4, checkpoint=2))
    assert writers_at(view, 4) == ((0, 1), (1, 1))
    assert list(train(view)) == [
        OpenSnapshot("checkpoint", (0, 1), (1, 1), "a node needs the training state")
    ]


def test_a_whole_node_writes_before_parts_of_others() -> None:
    """A stage of a node that isn't whole takes no part in the next step."""
    view = view_of([node_of(0, None, 4), node_of(1, 4, 4)], run_of(planned=6, committed=4))
    assert writers_at(view, 4) == ((1, 1), (1, 1))
    waiting = view_of([node_of(0, 4, 4, ready=False), node_of(1, 4, 4)], run_of(planned=6, committed=4))
    assert writers_at(waiting, 4) == ((1, 1), (1, 1))


def test_a_state_that_nobody_has_is_replayed_from_the_checkpoint() -> None:
    """Everybody loads the last checkpoint, waits until all have, then replays step by step up to the committed one."""
    nodes = [node_of(0, 4, None, epoch=2)]
    run = {"planned": 6, "committed": 4, "checkpoint": 2, "checkpoint_directory": "/c/0.2"}
    assert list(train(view_of(nodes, run_of(**run)))) == [
        LoadTraining(2, "/c/0.2", (0,), (2,), "no living stage has the committed state")
    ]
    loading = run_of(**run, loading=[[0, 2]])
    assert list(train(view_of([node_of(0, None, None, epoch=2)], loading))) == []
    assert list(train(view_of([node_of(0, 2, None, epoch=2)], loading))) == []
    for level in (2, 3):
        assert list(train(view_of([node_of(0, level, level, epoch=2)], loading))) == [
            StartStep(level + 1, (0,), (2,), "replay")
        ]
    assert list(train(view_of([node_of(0, 4, 4, epoch=2)], loading))) == [StartStep(5, (0,), (2,), "next")]


def test_a_fresh_cluster_begins_at_the_model_folder() -> None:
    """Step 0 without a checkpoint is the model itself."""
    view = view_of([node_of(0, None)], run_of(planned=1, committed=0))
    assert list(train(view)) == [LoadTraining(0, "", (0,), (1,), "no living stage has the committed state")]


def test_nothing_begins_during_a_rollback() -> None:
    """So that the step in the new version's name stays the last one."""
    run = run_of(planned=6, committed=4, rolling_back="rollback-1")
    assert list(train(view_of([node_of(0, 4, 4)], run))) == []
    assert list(train(view_of([node_of(0, None, None)], run))) == []


def test_a_checkpoint_that_was_refused_is_not_tried_again() -> None:
    """Nodes that have the state go on without the others; where nobody has it, training stands still."""
    run = run_of(planned=6, committed=4, checkpoint=4, refused="a file was changed")
    assert list(train(view_of([node_of(0, None, None)], run))) == []
    both = [node_of(0, 4, 4), node_of(1, None, 4)]
    assert list(train(view_of(both, run))) == [StartStep(5, (0,), (1,), "next")]


def test_a_node_lost_while_it_loads_is_not_waited_for() -> None:
    """It was told in an epoch that is over."""
    run = run_of(planned=6, committed=4, checkpoint=4, loading=[[0, 2]], checkpoint_directory="/c/0.4")
    assert list(train(view_of([node_of(0, None, epoch=3)], run))) == [
        LoadTraining(4, "/c/0.4", (0,), (3,), "no living stage has the committed state")
    ]


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.integers(0, 5)), st.booleans()
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_there_is_always_a_way_on(
    steps: list[tuple[int | None, int | None, bool]], committed: int, checkpoint: int
) -> None:
    """Whatever states the stages are in: with a ready node exactly one thing happens next, on ready nodes only."""
    checkpoint = min(checkpoint, committed)
    nodes = [
        node_of(index, *(None if step is None else min(step, committed) for step in (a, b)), ready=ready)
        for index, (a, b, ready) in enumerate(steps)
    ]
    view = view_of(nodes, run_of(planned=6, committed=committed, checkpoint=checkpoint))
    commands = list(train(view))
    able = {node.node for node in nodes if node.is_ready}
    assert len(commands) == bool(able)
    for command in commands:
        match command:
            case StartStep(step, members, _, _):
                assert set(members) == able
                assert {view.nodes[member].training_step for member in members} == {step - 1}
            case LoadTraining(step, _, loaders, _, _):
                assert step == checkpoint
                assert set(loaders) <= able
            case OpenSnapshot(_, writers, _, _):
                assert all(nodes[w].stages[s].training_step == committed for s, w in enumerate(writers))


@pytest.mark.parametrize(
    ("checkpoint", "published", "kept_from", "expected"),
    [(4, 6, 1, 4), (6, 4, 1, 4), (4, 4, 4, 4), (4, 4, 5, None), (0, 4, 1, None)],
)
def test_payloads_are_kept_until_they_are_safe_and_served(
    checkpoint: int, published: int, kept_from: int, expected: int | None
) -> None:
    """A step's payloads go when a checkpoint covers it and a served version contains it."""
    run = run_of(committed=6, checkpoint=checkpoint, published=published, kept_from=kept_from)
    wanted = [] if expected is None else [ForgetSteps(expected)]
    assert list(forget(view_of([node_of(0, 6)], run))) == wanted
