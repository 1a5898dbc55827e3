"""What the demo shows while it runs: each answer as it comes, and how many of the last ones were right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lemix.replies import ItemEnded, Reply
from lemix_studies.demo_plan import DemoArrival
from lemix_studies.wording import share

WINDOW = 25
"""Answers that the live exact match is counted over."""
_LINE_EVERY_S = 10.0
"""Without a terminal, which has no place for a picture that changes."""
_BAR_CELLS = 25
_PICTURES_PER_SECOND = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """The run so far."""

    at_s: float = 0.0
    answered: int = 0
    learned: int = 0
    step: int = 0
    weights_version: str = ""
    matches: tuple[bool, ...] = ()
    """Of the last answers, whether each was right."""
    question: str = ""
    answer: str = ""
    right_answer: str = ""

    @property
    def exact_match(self) -> float:
        """Share of the last answers that were right."""
        return sum(self.matches) / len(self.matches) if self.matches else 0.0


def advance(
    sight: Sight, arrival: DemoArrival, ended: ItemEnded, decode: Callable[[Sequence[int]], str]
) -> Sight:
    """The run with one more item's end; times are the caller's."""
    if ended.state != "done":
        return sight
    result: Mapping[str, Any] = json.loads(ended.result)
    if arrival.kind == "train":
        return replace(sight, learned=sight.learned + 1, step=max(sight.step, int(result["step"])))
    sight = replace(sight, answered=sight.answered + 1, weights_version=ended.weights_version)
    if arrival.kind == "score":
        return sight
    is_right = tuple(result["tokens"]) == arrival.reference
    return replace(
        sight,
        matches=(*sight.matches, is_right)[-WINDOW:],
        question=arrival.exchange.question,
        answer=decode(result["tokens"]),
        right_answer=arrival.exchange.fact.answer(),
    )


@dataclass
class Watch:
    """Hears every reply, and shows the run on a console."""

    console: Console
    arrivals: Mapping[str, DemoArrival]
    decode: Callable[[Sequence[int]], str]
    now: Callable[[], float]
    sight: Sight = field(default_factory=Sight)
    _began: float | None = None
    _next_line_s: float = _LINE_EVERY_S

    def hear(self, reply: Reply) -> None:
        """Take a reply in; those to nobody's question, which measure the idle cluster, are passed over."""
        arrival = self.arrivals.get(reply.item)
        if arrival is None:
            return
        if self._began is None:
            self._began = self.now() - arrival.at_s
        if isinstance(reply, ItemEnded):
            at_s = self.now() - self._began
            self.sight = replace(advance(self.sight, arrival, reply, self.decode), at_s=at_s)
        if not self.console.is_terminal and self.sight.at_s >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            self.console.print(line(self.sight), highlight=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the run for a ``with`` block."""
        if not self.console.is_terminal:
            yield
            return
        duration_s = max((arrival.at_s for arrival in self.arrivals.values()), default=0.0)
        lessons = sum(arrival.kind == "train" for arrival in self.arrivals.values())
        with Live(
            get_renderable=lambda: picture(self.sight, duration_s=duration_s, lessons=lessons),
            console=self.console,
            refresh_per_second=_PICTURES_PER_SECOND,
            transient=True,
        ):
            yield


def line(sight: Sight) -> str:
    """The run so far in a line."""
    return (
        f"{sight.at_s:4.0f} s: {sight.answered} questions answered, {sight.learned} corrections learned; "
        f"exact match {share(sight.exact_match)}, weights {sight.weights_version}"
    )


def picture(sight: Sight, *, duration_s: float, lessons: int) -> RenderableType:
    """The run so far in a few rows."""
    now_s = min(sight.at_s, duration_s)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(width=_BAR_CELLS)
    rows.add_column()
    time = ProgressBar(total=duration_s, completed=now_s, width=_BAR_CELLS)
    rows.add_row("time", time, f"{now_s:.0f} of {duration_s:.0f} s")
    rows.add_row("exact match", _bar(sight.exact_match), f"of the last {len(sight.matches)} answers")
    rows.add_row("questions", f"{sight.answered} answered", f"by weights {sight.weights_version or '…'}")
    if lessons:
        rows.add_row("corrections", f"{sight.learned} of {lessons} learned", f"in {sight.step} steps")
    return Group(rows, Text(), *_last_exchange(sight))


def _bar(part: float) -> Text:
    """A share as a bar with its figure in it."""
    text = Text(f" {share(part)}".ljust(_BAR_CELLS), style="on bright_black")
    text.stylize("black on green", 0, round(part * _BAR_CELLS))
    return text


def _last_exchange(sight: Sight) -> Iterator[Text]:
    if not sight.question:
        return
    yield Text.assemble(("Q  ", "dim"), sight.question)
    if sight.answer == sight.right_answer:
        yield Text.assemble(("A  ", "dim"), (f"{sight.answer} ✓", "green"))
    else:
        yield Text.assemble(
            ("A  ", "dim"), (f"{sight.answer} ✗", "red"), (f"  (now: {sight.right_answer})", "dim")
        )
