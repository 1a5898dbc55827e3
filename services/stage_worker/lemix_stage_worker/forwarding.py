"""A stage's share of iterations: computed in the order in which stage 0 planned them, one at a time.

What an iteration reads of the cache, those before it have written; so none may pass another on its node's way through
the stages. Which of several nodes' comes first is the ready queue's choice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lemix_common.messages import ForwardDone, ForwardFailed, Frame, OpenItem, ReleaseItem, RunForward
from lemix_common.sampling import Sampling
from lemix_stage_worker.batching import Wants
from lemix_stage_worker.device import wait_for
from lemix_stage_worker.hosted_stage import HostedStage, OpenedItem
from lemix_stage_worker.model.paged_row import PagedRow
from lemix_stage_worker.model.sampling import Choice, Chooser, choose_tokens
from lemix_stage_worker.model.scoring import token_logprobs
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.ready_queue import Batch, Task, Urgency
from lemix_stage_worker.tensors import on_device

NO_TOKEN = -1
"""In place of a token that nobody waits for any more."""
LONGEST_REASON = 500
"""Characters of an error that travel and are kept."""


class Surroundings(Protocol):
    """What computing needs of the worker around it."""

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node."""

    def schedule(self, task: Task) -> None:
        """Let the compute loop run a step when it is its turn."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """An iteration that waits at a later stage."""

    frame: RunForward
    tensors: Sequence[Tensor]
    """As the frame says."""
    release: Callable[[], None]
    at: float


@dataclass
class Forwarding:
    """The serving steps of every stage here."""

    around: Surroundings
    _lines: dict[tuple[int, int], deque[Arrived]] = field(default_factory=dict)
    """By (node, stage), iterations that wait there; the first is the compute loop's."""

    def open(self, host: HostedStage, frame: OpenItem, tensors: Sequence[Tensor] = ()) -> None:
        """Know an item from now on, here and on the stages behind."""
        sampling = Sampling(**{name: getattr(frame, name) for name in asdict(Sampling())})
        chooser = Chooser(sampling, frame.prompt_length, frame.stop_ids)
        if tensors:
            chooser.note(0, tensors[0].tolist())
        host.opened[frame.number] = OpenedItem(frame.item, frame.attempt, chooser)
        if not host.is_last:
            self.around.send(host, host.stage + 1, replace(frame, stage=host.stage + 1), tensors)

    def release(self, host: HostedStage, frame: ReleaseItem) -> None:
        """Forget an item, here and on the stages behind."""
        gone = [
            number
            for number, opened in host.opened.items()
            if (opened.item, opened.attempt) == (frame.item, frame.attempt)
        ]
        for number in gone:
            del host.opened[number]
        if not host.is_last:
            self.around.send(host, host.stage + 1, replace(frame, stage=host.stage + 1))

    def arrive(self, host: HostedStage, arrived: Arrived) -> None:
        """Let an iteration wait for its turn at a later stage."""
        line = self._lines.setdefault((host.node, host.stage), deque())
        line.append(arrived)
        if len(line) == 1:
            self._schedule(host, line)

    def forget(self, node: int) -> None:
        """The node starts afresh: nobody asks for what is on its way."""
        for position in [position for position in self._lines if position[0] == node]:
            for arrived in self._lines.pop(position):
                arrived.release()

    def compute(self, host: HostedStage, frame: RunForward, tensors: Sequence[Tensor]) -> None:
        """A stage's share, sent on when it is done. Raises what goes wrong; nothing was sent then."""
        began = time.monotonic()
        arrived, blocks_N, targets_T = tensors
        source = on_device(arrived, host.device)
        model = host.versions[frame.version]
        with torch.inference_mode():
            paged = host.open_cache().plan(_rows(frame, blocks_N), frame.version)
            hidden_BTD = model.run_paged(source, paged.positions_T, paged)
            if not host.is_last:
                wait_for(host.device)
                took_s = max(frame.slowest_s, time.monotonic() - began)
                following = replace(frame, stage=host.stage + 1, slowest_s=took_s)
                self.around.send(host, host.stage + 1, following, (hidden_BTD, blocks_N, targets_T))
                return
            choices = self._choose(host, model, frame, hidden_BTD[0])
            targets_T = on_device(targets_T, host.device)
            scores = (token_logprobs(model, hidden_BTD[0], targets_T),) if len(targets_T) else ()
        wait_for(host.device)
        done = ForwardDone(
            node=host.node,
            stage=0,
            epoch=host.epoch,
            iteration=frame.iteration,
            tokens=tuple(choice.token for choice in choices),
            logprobs=tuple(choice.logprob_text for choice in choices),
            slowest_s=max(frame.slowest_s, time.monotonic() - began),
        )
        self.around.send(host, 0, done, scores)

    def _schedule(self, host: HostedStage, line: deque[Arrived]) -> None:
        """The first iteration in line is the compute loop's."""
        arrived = line[0]
        frame = arrived.frame

        def run() -> None:
            if self._lines.get((host.node, host.stage)) is not line:
                return  # forgotten
            try:
                self.compute(host, frame, arrived.tensors)
            finally:
                line.popleft().release()
                if line:
                    self._schedule(host, line)

        def failed(error: Exception) -> None:
            told = ForwardFailed(
                node=host.node,
                stage=0,
                epoch=host.epoch,
                iteration=frame.iteration,
                reason=reason_of(error),
            )
            self.around.send(host, 0, told)

        known = [host.opened[number].item for number in frame.numbers if number in host.opened]
        rows = zip(frame.starts, frame.lengths, strict=True)
        contexts = sum(length * (start + length) for start, length in rows)
        self.around.schedule(
            Task(
                urgency=Urgency.DECODE if 1 in frame.lengths else Urgency.PREFILL,
                node=host.node,
                stage=host.stage,
                item=known[0] if known else "",
                version=frame.version,
                ready_at=arrived.at,
                run=run,
                failed=failed,
                batch=Batch(
                    [(item, arrived.at) for item in known], frame.version, sum(frame.lengths), contexts
                ),
            )
        )

    def _choose(
        self, host: HostedStage, model: StageModel, frame: RunForward, hidden_TD: Tensor
    ) -> list[Choice]:
        """The tokens that are wanted, in order."""
        lasts, choosers, positions, asked = [], [], [], []
        end = 0
        for number, start, length, wants in zip(
            frame.numbers, frame.starts, frame.lengths, frame.wants, strict=True
        ):
            end += length
            if wants == Wants.TOKEN:
                opened = host.opened.get(number)
                asked.append(opened)
                if opened is not None:
                    lasts.append(end - 1)
                    choosers.append(opened.chooser)
                    positions.append(start + length)
        if not lasts:
            return [Choice(NO_TOKEN)] * len(asked)
        logits_BV = model.logits(hidden_TD if len(lasts) == len(hidden_TD) else hidden_TD[lasts])
        chosen = choose_tokens(logits_BV, choosers, positions)
        for chooser, position, choice in zip(choosers, positions, chosen, strict=True):
            chooser.note(position, [choice.token])
        found = iter(chosen)
        return [Choice(NO_TOKEN) if opened is None else next(found) for opened in asked]


def reason_of(error: Exception) -> str:
    """What is told of it."""
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]


def _rows(frame: RunForward, blocks_N: Tensor) -> list[PagedRow]:
    blocks = blocks_N.tolist()
    rows, end = [], 0
    for start, length, num_blocks in zip(frame.starts, frame.lengths, frame.tables, strict=True):
        begin, end = end, end + num_blocks
        rows.append(PagedRow(start=start, length=length, blocks=tuple(blocks[begin:end])))
    return rows
