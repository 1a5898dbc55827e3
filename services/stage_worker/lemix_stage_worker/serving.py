"""Serving: requests are driven by stage 0, which alone writes their state; later stages only compute.

Tokens go round in iterations (see `batching`): stage 0 plans one and embeds, the stages compute, the last one chooses,
and `ForwardDone` returns to stage 0, which gives the clients their tokens and plans the next. Between two tokens a
request may be moved to a newer version (see `lemix_common.store.updates`): it is prefilled on that one from its
beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Protocol

import structlog
import torch
from torch import Tensor

from lemix_common.ids import Version
from lemix_common.messages import ForwardDone, ForwardFailed, OpenItem, ReleaseItem, RunForward
from lemix_common.sampling import sampling_of
from lemix_common.settings import ClusterSettings
from lemix_common.store.items import Call, ChosenTokens, Items, StartedItem
from lemix_common.store.updates import Updates
from lemix_common.text_stream import Decode
from lemix_stage_worker import forwarding
from lemix_stage_worker.admission import turn
from lemix_stage_worker.batching import Batcher, Iteration, Member, PlannedRow, Wants
from lemix_stage_worker.finishing import Finishing, finishing_of
from lemix_stage_worker.forwarding import Forwarding, reason_of
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.iteration_cost import IterationCost
from lemix_stage_worker.kv_blocks import BlockPool
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.ready_queue import Batch, Task, Urgency

log = structlog.get_logger()


class Surroundings(forwarding.Surroundings, Protocol):
    """What serving needs of the worker around it."""

    def report(
        self, call: Call, item: StartedItem, node: int, then: Callable[[Sequence[object]], None] | None = None
    ) -> None:
        """Tell the broker about an item, and go on with its answer."""

    def report_tokens(self, call: Call, items: Sequence[StartedItem], node: int) -> None:
        """Tell the broker tokens of these items."""

    def ended(self, node: int, entry: str) -> None:
        """An item left the node."""

    def num_workers(self, node: int) -> int:
        """How many workers host the node's stages."""


@dataclass(eq=False)
class Request:
    """An item in work, at its stage 0."""

    started: StartedItem
    member: Member
    finishing: Finishing
    tokens: list[int]
    """Generated so far, by earlier attempts too."""
    logprobs: list[str]
    """Of these tokens, as they travel, where they are asked for; of a score, none."""
    scores: list[float] = field(default_factory=list)
    """Log-probabilities of a reference's tokens so far."""

    @property
    def is_score(self) -> bool:
        """Nothing is generated."""
        return self.started.kind == "score"

    @property
    def rebuilds(self) -> bool:
        """It goes on upon each newer version that is served."""
        return self.started.fields.get("on_update") == "rebuild"


@dataclass(eq=False)
class NodeRequests:
    """The requests of a node whose stage 0 is here."""

    batcher: Batcher
    cost: IterationCost
    by_number: dict[int, Request] = field(default_factory=dict)
    with_token: list[Request] = field(default_factory=list)
    """Those whose newest token their clients don't have yet."""
    is_scheduled: bool = False
    """Its next iteration is the compute loop's."""
    has_failed: bool = False
    """An iteration did; what later ones chose on its ground isn't forgotten yet."""
    num_begun: int = 0


@dataclass
class Serving:
    """The requests of every stage 0 here."""

    items: Items
    updates: Updates
    around: Surroundings
    forwarding: Forwarding
    settings: ClusterSettings
    now: Callable[[], float]
    decode: Decode
    """Tokens to text, for stop strings."""
    served: str = ""
    """The version published last, since the worker began: what is started comes with the newest one there is."""
    cleared: str = ""
    """The version that everything has to leave."""
    moving: dict[int, str] = field(default_factory=dict)
    """Node to the item that is being moved there: one at a time, so that others never wait for two."""
    requests: dict[tuple[int, str], Request] = field(default_factory=dict)
    nodes: dict[int, NodeRequests] = field(default_factory=dict)

    # ---- requests
    def begin(self, host: HostedStage, started: StartedItem, eos_ids: Sequence[int]) -> None:
        """Take an item into work: its prompt, and what earlier attempts generated, are prefilled."""
        node = self._node(host)
        request = self._request(started, eos_ids, number=node.num_begun)
        node.num_begun += 1
        self.requests[host.node, started.item] = request
        if request.finishing.finish is not None:  # the attempt before died between its last token and its end
            self._generated(host, request)
            return
        node.by_number[request.member.number] = request
        self._open(host, request)
        node.batcher.add(request.member)
        self.wake(host)

    def fail(self, host: HostedStage, request: Request, reason: str) -> None:
        """End an item that can't be computed."""
        log.warning("item_failed", **_names(host, request), reason=reason)
        self.around.report(self.items.fail(request.started, host.node, reason), request.started, host.node)
        self.drop(host, request.started.item)

    def drop(self, host: HostedStage, item: str) -> None:
        """Forget an item that ended here or went elsewhere, on all stages."""
        request = self.requests.pop((host.node, item), None)
        if request is None:
            return
        self._has_moved(host.node, item)
        node = self._node(host)
        node.batcher.drop(request.member)
        if node.by_number.pop(request.member.number, None) is not None:
            attempt = request.started.attempt
            release = ReleaseItem(node=host.node, stage=0, epoch=host.epoch, item=item, attempt=attempt)
            self.forwarding.release(host, release)
        self.around.ended(host.node, request.started.entry)
        self.wake(host)

    def drop_all(self, node: int) -> None:
        """The node starts afresh: its requests are somebody else's, or come again."""
        self.moving.pop(node, None)
        self.nodes.pop(node, None)
        for key in [key for key in self.requests if key[0] == node]:
            self.around.ended(node, self.requests.pop(key).started.entry)

    # ---- iterations
    def wake(self, host: HostedStage) -> None:
        """Have the next iteration planned and begun, if there is one, when it is its turn."""
        node = self.nodes.get(host.node)
        if node is None or node.is_scheduled:
            return
        plan_at = node.batcher.plan_at()
        if plan_at is None or plan_at > self.now():
            return
        node.is_scheduled = True
        can_run_at = self.now()  # before that, the stages had as many iterations as they take
        batch, begun = Batch(), []

        def run() -> None:
            node.is_scheduled = False
            if self.nodes.get(host.node) is not node:
                return
            self._forget_failure(host, node)
            iteration = node.batcher.plan()
            if iteration is None:
                return
            begun.append(iteration.number)
            batch.version, batch.num_tokens = iteration.version, iteration.num_tokens
            batch.contexts = iteration.contexts
            batch.items += [
                (node.by_number[row.member.number].started.item, max(row.ready_at, can_run_at))
                for row in iteration.rows
            ]
            self._forward(host, iteration)
            self.wake(host)

        def failed(error: Exception) -> None:
            if not begun:
                raise error  # it is the plan that is wrong, not what was planned
            self._iteration_failed(host, begun[0], reason_of(error))

        self.around.schedule(
            Task(
                urgency=Urgency.DECODE if node.batcher.decodes else Urgency.PREFILL,
                node=host.node,
                stage=host.stage,
                item="",
                version="",
                ready_at=can_run_at,
                run=run,
                failed=failed,
                batch=batch,
            )
        )

    def next_wake_s(self, at_most_s: float) -> float:
        """How long nothing has to be begun by itself."""
        plans = (node.batcher.plan_at() for node in self.nodes.values() if not node.is_scheduled)
        waits = [plan_at - self.now() for plan_at in plans if plan_at]
        return max(0.0, min([at_most_s, *waits]))

    def forward_done(self, host: HostedStage, frame: ForwardDone, tensors: Sequence[Tensor]) -> None:
        """Give the clients their tokens and scores; end what is complete, go on with the rest."""
        node = self._node(host)
        iteration = node.batcher.end(frame.iteration)
        if iteration is None:
            return
        node.cost.note(iteration.num_tokens, frame.slowest_s)
        chosen = zip(frame.tokens, frame.logprobs, strict=True)
        scores = iter(tensors[0].tolist() if tensors else [])
        for row in iteration.rows:
            if row.wants is Wants.TOKEN:
                token, logprob = next(chosen)
                if request := self._request_of(node, row):
                    self.token_chosen(host, request, token, logprob)
            elif row.wants is Wants.SCORES:
                found = [next(scores) for _ in range(_num_scores(row))]
                if request := self._request_of(node, row):
                    self._scored(host, request, row, found)
        self.hand_out(host)

    def forward_failed(self, host: HostedStage, frame: ForwardFailed) -> None:
        """A later stage couldn't compute an iteration."""
        self._iteration_failed(host, frame.iteration, frame.reason)

    def token_chosen(self, host: HostedStage, request: Request, token: int, logprob: str) -> None:
        """Take a request's next token; clients get it with the next `hand_out`."""
        self._has_moved(host.node, request.started.item)
        request.tokens.append(token)
        request.logprobs += [logprob] if logprob else []
        request.finishing.add(token)
        node = self._node(host)
        node.batcher.give_token(request.member, token, self.now())
        node.with_token.append(request)

    def hand_out(self, host: HostedStage) -> None:
        """Give the clients an iteration's tokens; end the requests that have their last, go on with the others."""
        node = self._node(host)
        requests, node.with_token = node.with_token, []
        if requests:
            chosen = [_last_token(request) for request in requests]
            self.around.report_tokens(
                self.items.append_tokens(chosen), [request.started for request in requests], host.node
            )
        for request in requests:
            if request.finishing.finish is not None:
                self._generated(host, request)
            elif host.node not in self.moving and self._must_move(request):
                self._move(host, request)
        self.wake(host)

    # ---- how
    def _node(self, host: HostedStage) -> NodeRequests:
        if host.node not in self.nodes:
            settings, cost = self.settings, IterationCost()
            batcher = Batcher(
                BlockPool(host.num_blocks),
                max_in_flight=self.around.num_workers(host.node),
                chunk=partial(cost.more_tokens_within, settings.max_block_ms / 1000),
                max_tokens=settings.max_batch_tokens,
                rule="paper" if settings.batching == "paper" else "iteration",
                max_batch=settings.max_running,
                max_wait_s=settings.batch_wait_ms / 1000,
            )
            self.nodes[host.node] = NodeRequests(batcher, cost)
        return self.nodes[host.node]

    def _request(self, started: StartedItem, eos_ids: Sequence[int], *, number: int) -> Request:
        finishing = finishing_of(started.fields, eos_ids=eos_ids, tokens=started.tokens, decode=self.decode)
        is_score = started.kind == "score"
        following = started.reference[:-1] if is_score else started.tokens
        member = Member(
            number=number,
            version=started.version,
            ids=[*started.prompt, *following],
            turn=turn(started.fields),
            ready_at=self.now(),
            scores_from=len(started.prompt) - 1 if is_score else None,
        )
        return Request(started, member, finishing, list(started.tokens), list(started.logprobs))

    def _open(self, host: HostedStage, request: Request) -> None:
        """Tell the stages of an item, before its first row."""
        started, sampling = request.started, sampling_of(request.started.fields)
        frame = OpenItem(
            node=host.node,
            stage=0,
            epoch=host.epoch,
            number=request.member.number,
            item=started.item,
            attempt=started.attempt,
            prompt_length=len(started.prompt),
            stop_ids=request.finishing.stop_ids if sampling.min_tokens else (),
            **asdict(sampling),
        )
        ids = (torch.tensor(request.member.ids),) if sampling.needs_history else ()
        self.forwarding.open(host, frame, ids)

    def _forward(self, host: HostedStage, iteration: Iteration) -> None:
        rows = iteration.rows
        frame = RunForward(
            node=host.node,
            stage=0,
            epoch=host.epoch,
            iteration=iteration.number,
            version=iteration.version,
            numbers=tuple(row.member.number for row in rows),
            starts=tuple(row.start for row in rows),
            lengths=tuple(row.length for row in rows),
            tables=tuple(len(row.blocks) for row in rows),
            wants=tuple(int(row.wants) for row in rows),
            slowest_s=0.0,
        )
        ids_1T = torch.tensor([[token for row in rows for token in row.ids]])
        blocks_N = torch.tensor([block for row in rows for block in row.blocks], dtype=torch.int32)
        is_scored = any(row.wants is Wants.SCORES for row in rows)
        targets = [target for row in rows for target in self._targets(host, row)] if is_scored else []
        targets_T = torch.tensor(targets, dtype=torch.int64)
        self.forwarding.compute(host, frame, (ids_1T, blocks_N, targets_T))

    def _targets(self, host: HostedStage, row: PlannedRow) -> Iterator[int]:
        """The token that is scored behind each of a row's."""
        request = self.nodes[host.node].by_number[row.member.number]
        for position in range(row.start, row.start + row.length):
            index = position + 1 - len(request.started.prompt)
            yield request.started.reference[index] if request.is_score and index >= 0 else NO_TARGET

    def _request_of(self, node: NodeRequests, row: PlannedRow) -> Request | None:
        """Whose row it is, if it is still asked for."""
        return node.by_number.get(row.member.number) if row.is_current else None

    def _iteration_failed(self, host: HostedStage, number: int, reason: str) -> None:
        node = self._node(host)
        log.warning("iteration_failed", node=host.node, iteration=number, reason=reason)
        for member in node.batcher.failed(number):
            self.fail(host, node.by_number[member.number], reason)
        node.has_failed = True
        self.wake(host)

    def _forget_failure(self, host: HostedStage, node: NodeRequests) -> None:
        """Tell the stages anew what everybody has had: later iterations may have noted what was chosen in vain.

        When nothing is on its way any more, so that nothing is noted behind it.
        """
        if node.has_failed and not node.batcher.in_flight:
            node.has_failed = False
            for request in node.by_number.values():
                self._open(host, request)

    def _scored(
        self, host: HostedStage, request: Request, row: PlannedRow, logprobs: Sequence[float]
    ) -> None:
        begin = row.start + row.length - len(logprobs) - len(request.started.prompt) + 1
        request.scores[begin:] = [round(value, 7) for value in logprobs]
        if len(request.scores) == len(request.started.reference):
            loss = -sum(request.scores) / len(request.scores)
            self._complete(host, request, {"loss": loss, "logprobs": request.scores})

    def _generated(self, host: HostedStage, request: Request) -> None:
        self._complete(host, request, request.finishing.result(request.tokens, request.logprobs))

    def _complete(self, host: HostedStage, request: Request, result: Mapping[str, object]) -> None:
        log.info("item_done", **_names(host, request), tokens=len(request.tokens))
        self.around.report(
            self.items.complete(request.started, host.node, result), request.started, host.node
        )
        self.drop(host, request.started.item)

    # ---- newer versions
    def _must_move(self, request: Request) -> bool:
        version, served = request.started.version, self.served
        is_behind = bool(served) and Version.parse(version) < Version.parse(served)
        return version == self.cleared or (request.rebuilds and is_behind)

    def _move(self, host: HostedStage, request: Request) -> None:
        """Have the item moved; nothing of it is computed meanwhile, so that no token is of the version it left."""
        started, node = request.started, self._node(host)
        self.moving[host.node] = started.item
        node.batcher.drop(request.member)

        def moved(answer: Sequence[object]) -> None:
            if self.requests.get((host.node, started.item)) is request:
                request.started = replace(started, version=str(answer[1]))
                request.member.ready_at = self.now()
                log.info("item_moved", **_names(host, request), left=started.version)
                node.batcher.begin_again(request.member, version=request.started.version)
                self.wake(host)

        move = self.updates.move(started.item, started.attempt, node=host.node, epoch=host.epoch)
        self.around.report(move, started, host.node, moved)

    def _has_moved(self, node: int, item: str) -> None:
        if self.moving.get(node) == item:
            del self.moving[node]


def _last_token(request: Request) -> ChosenTokens:
    started, index = request.started, len(request.tokens) - 1
    return ChosenTokens(
        started.item, started.attempt, index, (request.tokens[index],), tuple(request.logprobs[index:])
    )


def _num_scores(row: PlannedRow) -> int:
    """Of the tokens of a row, those whose next one is scored."""
    assert row.member.scores_from is not None
    return row.start + row.length - max(row.start, row.member.scores_from)


def _names(host: HostedStage, request: Request) -> dict[str, object]:
    """What a log line says of an item."""
    started = request.started
    return {
        "item": started.item,
        "kind": started.kind,
        "attempt": started.attempt,
        "node": host.node,
        "stage": host.stage,
        "version": started.version,
    }
