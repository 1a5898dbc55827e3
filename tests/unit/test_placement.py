"""Which worker hosts which stage, as a function of what the coordinator sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from lemix_common.settings import ClusterSettings
from lemix_common.store.training import run_state
from lemix_coordinator.commands import ForgetWorker, PlaceNode
from lemix_coordinator.placement import place
from lemix_coordinator.view import ClusterView, NodeView, StageView, WorkerView

PATIENCE_S = 20.0


def hosts_after(
    hosts: Sequence[str],
    alive: str,
    *,
    dead: str = "",
    workers: int = 0,
    empty_for_s: Mapping[int, float] | None = None,
) -> str:
    """The hosts of two nodes of three stages after one look, '-' for nobody; workers have one letter each."""
    settings = ClusterSettings(nodes=2, stages=3, workers=workers, takeover_after_s=PATIENCE_S)
    names = [name.replace("-", "") for name in hosts]
    view = ClusterView(
        settings=settings,
        is_stopping=False,
        workers=tuple(WorkerView(worker=name, is_dead=name in dead) for name in alive + dead),
        nodes=tuple(
            NodeView(
                node=node,
                epoch=1,
                stages=tuple(
                    StageView(worker=name, is_ready=bool(name), training_step=0)
                    for name in names[3 * node : 3 * node + 3]
                ),
            )
            for node in range(2)
        ),
        run=run_state("main", {}),
        served="0.0",
        draining="",
        draining_in_flight=0,
        draining_for_s=0.0,
        is_draining_cleared=False,
        divided_s=0.0,
        undivided_s=0.0,
        operations=(),
        recent_tax=0.0,
        empty_for_s={divmod(at, 3): seconds for at, seconds in (empty_for_s or {}).items()},
    )
    after = list(names)
    for command in place(view):
        match command:
            case PlaceNode(node, placed):
                after[3 * node : 3 * node + 3] = placed
            case ForgetWorker(worker):
                assert worker in dead
    return "".join(name or "-" for name in after)


NOBODY = "------"
WAITED = dict.fromkeys(range(6), PATIENCE_S)


def test_a_cluster_forms_when_all_its_workers_are_there() -> None:
    """Each stage gets one; who comes on top stands by."""
    assert hosts_after(NOBODY, "abcde") == NOBODY
    assert hosts_after(NOBODY, "abcdef") == "abcdef"
    assert hosts_after(NOBODY, "abcdefg") == "abcdef"


@pytest.mark.parametrize(
    ("alive", "hosts"),
    [("a", "aaaaaa"), ("ab", "aaabbb"), ("abc", "aabbcc"), ("abcd", "aabccd"), ("abcde", "aabcde")],
)
def test_a_cluster_forms_of_fewer_workers_after_a_while(alive: str, hosts: str) -> None:
    """Stages are spread evenly over those that are there, neighbours together."""
    assert hosts_after(NOBODY, alive) == NOBODY
    assert hosts_after(NOBODY, alive, empty_for_s=WAITED) == hosts


def test_fewer_workers_are_waited_for_no_longer_if_no_more_are_asked_for() -> None:
    """The setting `workers` says how many there will be."""
    assert hosts_after(NOBODY, "ab", workers=2) == "aaabbb"
    assert hosts_after(NOBODY, "abcd", workers=4) == "aabccd"


def test_without_a_worker_nothing_happens() -> None:
    """However long it takes."""
    assert hosts_after(NOBODY, "", empty_for_s=WAITED) == NOBODY


def test_a_lost_stage_waits_for_a_fresh_worker_then_moves_to_a_living_one() -> None:
    """The living one with the fewest stages."""
    assert hosts_after("abcdef", "abdef", dead="c") == "ab-def"
    assert hosts_after("ab-def", "abdef", empty_for_s={2: PATIENCE_S - 1}) == "ab-def"
    assert hosts_after("ab-def", "abdefg", empty_for_s={2: 1}) == "abgdef"
    assert hosts_after("ab-def", "abdef", empty_for_s={2: PATIENCE_S}) == "abadef"
    assert hosts_after("aba-ef", "abef", empty_for_s={3: PATIENCE_S}) == "ababef"


def test_a_worker_that_stands_by_takes_a_lost_stage_at_once() -> None:
    """It hosts nothing yet."""
    assert hosts_after("abcdef", "abdefg", dead="c") == "abgdef"


def test_a_fresh_worker_takes_all_that_one_lost() -> None:
    """Where workers host several stages each, one process more takes as many."""
    assert hosts_after("aaabbb", "b", dead="a") == "---bbb"
    assert hosts_after("---bbb", "bc", empty_for_s=dict.fromkeys(range(3), 1.0)) == "cccbbb"
    assert hosts_after("---bbb", "b", empty_for_s=dict.fromkeys(range(3), PATIENCE_S)) == "bbbbbb"
