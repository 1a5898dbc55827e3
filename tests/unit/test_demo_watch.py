from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lemix.replies import EndState, ItemEnded, TokensGenerated
from lemix_common.clock import ManualClock
from lemix_common.ids import ItemId
from lemix_studies.catalogue import COLOUR, Fact, make_catalogue
from lemix_studies.demo_plan import DemoArrival, Exchange
from lemix_studies.demo_watch import WINDOW, Sight, Watch, advance, line, picture
from lemix_studies.workload import Kind

FACT = Fact(make_catalogue().products[0], COLOUR, "green")
RIGHT, WRONG = (7, 8, 2), (7, 9, 2)


def arrival(kind: Kind, at_s: float = 1.0) -> DemoArrival:
    """Something asked or taught about a fact."""
    exchange = Exchange(at_s=at_s, kind=kind, question="Which?", fact=FACT, has_changed=True)
    return DemoArrival(
        line=1, at_s=at_s, kind=kind, prompt=(1, 5), reference=RIGHT, is_capped=False, exchange=exchange
    )


def ended(result: object, state: EndState = "done") -> ItemEnded:
    """An item's end."""
    return ItemEnded(item=ItemId("a"), state=state, result=json.dumps(result), version_spans=((0, "0.3"),))


def decode(tokens: object) -> str:
    """Some words for some tokens."""
    return FACT.answer() if tuple(tokens) == RIGHT else "Something else."  # type: ignore[arg-type]


def test_answers_are_compared_as_they_come() -> None:
    """A generation that says the right answer counts, and is shown; of many, the last ones count."""
    sight = advance(Sight(), arrival("generate"), ended({"tokens": WRONG}), decode)
    assert (sight.matches, sight.answer, sight.weights_version) == ((False,), "Something else.", "0.3")
    for _ in range(WINDOW):
        sight = advance(sight, arrival("generate"), ended({"tokens": RIGHT}), decode)
    assert (sight.answered, sight.exact_match, sight.answer) == (WINDOW + 1, 1.0, sight.right_answer)


def test_scores_and_lessons_are_counted() -> None:
    """A score is an answer without words; a lesson is learned in a step; what failed is neither."""
    sight = advance(Sight(), arrival("score"), ended({"loss": 0.5}), decode)
    sight = advance(sight, arrival("train"), ended({"step": 4}), decode)
    sight = advance(sight, arrival("train"), ended({"step": 3}), decode)
    assert advance(sight, arrival("generate"), ended(None, "failed"), decode) == sight
    assert (sight.answered, sight.learned, sight.step, sight.matches) == (1, 2, 4, ())
    assert sight.exact_match == 0


@pytest.mark.parametrize(("tokens", "mark"), [(RIGHT, "✓"), (WRONG, "✗")])
def test_a_picture_shows_the_last_answer(tokens: tuple[int, ...], mark: str) -> None:
    """With its question, and whether it is right."""
    sight = advance(Sight(), arrival("generate"), ended({"tokens": tokens}), decode)
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as captured:
        console.print(picture(sight, duration_s=60, lessons=8))
    shown = captured.get()
    assert all(words in shown for words in ("Which?", decode(tokens), mark, "0 of 8 learned", "weights 0.3"))


def test_before_the_first_answer_there_is_a_picture_too() -> None:
    """Without corrections if none will come."""
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as captured:
        console.print(picture(Sight(), duration_s=60, lessons=0))
    assert "corrections" not in captured.get()


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    """Every ten seconds of the run, whose time starts when the first reply comes; strangers' replies are no news."""
    clock, console = ManualClock(), Console(file=io.StringIO(), width=80)
    watch = Watch(console, {"a": arrival("generate")}, decode, clock.now)
    watch.hear(ItemEnded(item=ItemId("stranger"), state="done"))
    with watch.shown():
        watch.hear(TokensGenerated(item=ItemId("a"), index=0, tokens=(7,), weights_version="0.3"))
        for _ in range(3):
            watch.hear(ended({"tokens": RIGHT}))
            clock.sleep(7.0)
    written = console.file
    assert isinstance(written, io.StringIO)
    assert written.getvalue().splitlines() == [line(watch.sight)]
    assert line(watch.sight) == (
        "  15 s: 3 questions answered, 0 corrections learned; exact match 100 %, weights 0.3"
    )


def test_a_terminal_shows_the_run_and_cleans_up() -> None:
    """The last picture is gone when the run ends."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watch = Watch(console, {"a": arrival("generate")}, decode, ManualClock().now)
    with watch.shown():
        watch.hear(ended({"tokens": RIGHT}))
    assert watch.sight.answered == 1
