from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from lemix_stage_worker.ready_queue import CATEGORY, ReadyQueue, Task, Urgency


def task(item: str, urgency: Urgency, ran: list[str] | None = None, pieces: int = 1) -> Task:
    """A task that notes each of its pieces."""

    def run() -> Iterator[None]:
        for piece in range(pieces):
            if ran is not None:
                ran.append(f"{item}{piece}")
            yield

    return Task(
        urgency=urgency,
        node=0,
        stage=0,
        item=item,
        version="0.0",
        ready_at=0.0,
        run=run,
        failed=lambda _: None,
    )


@given(st.lists(st.sampled_from(list(Urgency)), max_size=20))
def test_the_most_urgent_comes_first_ties_by_arrival(urgencies: list[Urgency]) -> None:
    """Whatever is added in whatever order."""
    ready = ReadyQueue()
    for arrival, urgency in enumerate(urgencies):
        ready.add(task(str(arrival), urgency))
    taken = [ready.take().task for _ in urgencies]
    assert [(t.urgency, int(t.item)) for t in taken] == sorted((u, i) for i, u in enumerate(urgencies))
    assert not ready


def test_serving_comes_before_training() -> None:
    """The whole order, as traces name it."""
    assert [CATEGORY[urgency] for urgency in sorted(Urgency)] == [
        "decode",
        "prefill",
        "optimizer",
        "training_backward",
        "training_forward",
        "training_backward",  # gradients of weights, which nobody waits for
    ]


def test_training_gives_way_at_its_safepoints_only_to_serving() -> None:
    """A long training step runs in pieces; a request that has become ready runs between two of them."""
    ready, ran = ReadyQueue(), list[str]()
    ready.add(task("backward", Urgency.BACKWARD, ran, pieces=3))
    step = ready.take()
    step.advance()
    ready.add(task("optimizer", Urgency.OPTIMIZER, ran))
    assert not ready.must_give_way(step)
    ready.add(task("decode", Urgency.DECODE, ran))
    assert ready.must_give_way(step)
    ready.put_back(step)
    served = ready.take()
    assert served.task.item == "decode"
    assert not ready.must_give_way(served)


def test_an_interrupted_step_goes_on_where_it_was() -> None:
    """In its old place among those as urgent, with its next piece."""
    ready, ran = ReadyQueue(), list[str]()
    ready.add(task("a", Urgency.FORWARD, ran, pieces=2))
    ready.add(task("b", Urgency.FORWARD, ran))
    while ready:
        step = ready.take()
        step.advance()
        if not step.is_done:
            ready.put_back(step)
    assert ran == ["a0", "a1", "b0"]


def test_a_task_without_safepoints_is_done_at_once() -> None:
    """Serving steps just run."""
    ran: list[str] = []
    whole = Task(
        urgency=Urgency.DECODE,
        node=0,
        stage=0,
        item="x",
        version="0.0",
        ready_at=0.0,
        run=lambda: ran.append("x"),
        failed=lambda _: None,
    )
    ready = ReadyQueue()
    ready.add(whole)
    step = ready.take()
    step.advance()
    assert step.is_done
    assert ran == ["x"]


def test_training_goes_first_where_it_is_due() -> None:
    """Its most urgent task; where there is none, serving."""
    ready = ReadyQueue()
    ready.add(task("decode", Urgency.DECODE))
    assert ready.take(is_training_due=True).task.item == "decode"
    for item, urgency in (
        ("decode", Urgency.DECODE),
        ("forward", Urgency.FORWARD),
        ("back", Urgency.BACKWARD),
    ):
        ready.add(task(item, urgency))
    assert [ready.take(is_training_due=due).task.item for due in (True, False, True)] == [
        "back",
        "decode",
        "forward",
    ]


def test_fifo_knows_no_urgency() -> None:
    """The paper's order: as tasks come, and no piece of training gives way."""
    ready = ReadyQueue(is_fifo=True)
    for item, urgency in (
        ("forward", Urgency.FORWARD),
        ("decode", Urgency.DECODE),
        ("back", Urgency.BACKWARD),
    ):
        ready.add(task(item, urgency))
    step = ready.take(is_training_due=True)
    assert step.task.item == "forward"
    assert not ready.must_give_way(step)
    assert [ready.take().task.item, ready.take().task.item] == ["decode", "back"]
