"""Serving: requests are driven by stage 0, which alone writes their state; later stages only compute.

A request's tokens go round: stage 0 embeds, the stages compute, the last one chooses, and `TokenChosen` returns to
stage 0, which gives the token to the client and sends the next one. Between two tokens a request may be moved to a
newer version (see `lemix_common.store.updates`): it is prefilled on that one from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog
import torch
from torch import Tensor

from lemix_common.ids import Version
from lemix_common.messages import ForwardFailed, Frame, ReleaseItem, RunForward, ScoresComputed, TokenChosen
from lemix_common.sampling import Sampling
from lemix_common.store.items import Call, Items, StartedItem
from lemix_common.store.updates import Updates
from lemix_stage_worker.hosted_stage import CacheKey, HostedStage
from lemix_stage_worker.model.sampling import choose_token
from lemix_stage_worker.model.scoring import NO_TARGET, token_logprobs
from lemix_stage_worker.ready_queue import Task, Urgency

log = structlog.get_logger()

LONGEST_REASON = 500
"""Characters of an error that travel and are kept."""


class Surroundings(Protocol):
    """What serving needs of the worker around it."""

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node."""

    def schedule(self, task: Task) -> None:
        """Let the compute loop run a step when it is its turn."""

    def report(
        self, call: Call, item: StartedItem, node: int, then: Callable[[Sequence[object]], None] | None = None
    ) -> None:
        """Tell the broker about an item, and go on with its answer."""

    def ended(self, node: int, entry: str) -> None:
        """An item left the node."""


@dataclass(eq=False)
class Request:
    """An item in work, at its stage 0."""

    started: StartedItem
    tokens: list[int]
    """Generated so far, by earlier attempts too."""
    max_new_tokens: int
    stop_ids: frozenset[int]
    sampling: Sampling

    @property
    def is_score(self) -> bool:
        """Prefill only."""
        return self.started.kind == "score"

    @property
    def rebuilds(self) -> bool:
        """It goes on upon each newer version that is served."""
        return self.started.fields.get("on_update") == "rebuild"

    @property
    def sequence(self) -> list[int]:
        """The prompt and what has been generated."""
        return [*self.started.prompt, *self.tokens]

    @property
    def finish_reason(self) -> str | None:
        """Why it is complete, if it is."""
        if self.tokens and self.tokens[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None


@dataclass
class Serving:
    """The requests of every stage 0 here, and the serving steps of every stage here."""

    items: Items
    updates: Updates
    around: Surroundings
    now: Callable[[], float]
    served: str = ""
    """The version published last, since the worker began: what is started comes with the newest one there is."""
    cleared: str = ""
    """The version that everything has to leave."""
    moving: dict[int, str] = field(default_factory=dict)
    """Node to the item that is being moved there: one at a time, so that others never wait for two."""
    requests: dict[tuple[int, str], Request] = field(default_factory=dict)

    # ---- requests, at stage 0
    def begin(self, host: HostedStage, started: StartedItem, stop_ids: Sequence[int]) -> None:
        """Take an item into work: its prompt, and what earlier attempts generated, are prefilled."""
        request = _request(started, stop_ids)
        self.requests[host.node, started.item] = request
        if request.is_score:
            ids = [*started.prompt, *started.reference]
            targets = torch.tensor(
                [[*[NO_TARGET] * (len(started.prompt) - 1), *started.reference, NO_TARGET]]
            )
            self._forward(host, request, ids, 0, wants="scores", targets=targets)
        elif request.finish_reason is not None:  # the attempt before died between its last token and its end
            self._generated(host, request)
        else:
            self._go_on(host, request, request.sequence, 0)

    def token_chosen(self, host: HostedStage, frame: TokenChosen) -> None:
        """Give the client its token; end the request or go on with the next."""
        request = self._current(host, frame.item, frame.attempt)
        if request is None:
            return
        self._has_moved(host.node, frame.item)
        index = frame.position - len(request.started.prompt)
        request.tokens.append(frame.token)
        started = request.started
        self.around.report(
            self.items.append_tokens(started.item, started.attempt, index, [frame.token]), started, host.node
        )
        if request.finish_reason is not None:
            self._generated(host, request)
        else:
            self._go_on(host, request, [frame.token], frame.position)

    def scores_computed(self, host: HostedStage, frame: ScoresComputed, logprobs_T: Tensor) -> None:
        """End a scored item with its result."""
        request = self._current(host, frame.item, frame.attempt)
        if request is None:
            return
        logprobs = [round(value, 7) for value in logprobs_T.tolist()]
        self._complete(host, request, {"loss": -sum(logprobs) / len(logprobs), "logprobs": logprobs})

    def fail(self, host: HostedStage, item: str, attempt: int, reason: str) -> None:
        """End an item that can't be computed."""
        request = self._current(host, item, attempt)
        if request is not None:
            log.warning("item_failed", **_names(host, request), reason=reason)
            self.around.report(
                self.items.fail(request.started, host.node, reason), request.started, host.node
            )
            self.drop(host, item)

    def drop(self, host: HostedStage, item: str) -> None:
        """Forget an item that ended here or went elsewhere, on all stages."""
        request = self.requests.pop((host.node, item), None)
        if request is None:
            return
        self._has_moved(host.node, item)
        self.around.ended(host.node, request.started.entry)
        self.release(
            host,
            ReleaseItem(
                node=host.node, stage=0, epoch=host.epoch, item=item, attempt=request.started.attempt
            ),
        )

    def release(self, host: HostedStage, frame: ReleaseItem) -> None:
        """Free what the item holds here, then on the next stage: behind the steps that are on their way there."""
        host.drop_caches(frame.item)
        if not host.is_last:
            self.around.send(host, host.stage + 1, replace(frame, stage=host.stage + 1))

    def drop_all(self, node: int) -> None:
        """The node starts afresh: its requests are somebody else's, or come again."""
        self.moving.pop(node, None)
        for key in [key for key in self.requests if key[0] == node]:
            self.around.ended(node, self.requests.pop(key).started.entry)

    def _go_on(self, host: HostedStage, request: Request, ids: Sequence[int], position: int) -> None:
        """To the next token, by what its version hasn't seen yet; or first to another version."""
        if host.node not in self.moving and self._must_move(request):
            self._move(host, request)
        else:
            self._forward(host, request, ids, position, wants="token")

    def _must_move(self, request: Request) -> bool:
        version, served = request.started.version, self.served
        is_behind = bool(served) and Version.parse(version) < Version.parse(served)
        return version == self.cleared or (request.rebuilds and is_behind)

    def _move(self, host: HostedStage, request: Request) -> None:
        """Have the item moved; nothing of it is computed meanwhile, so that no token is of the version it left."""
        started = request.started
        self.moving[host.node] = started.item

        def moved(answer: Sequence[object]) -> None:
            if self._current(host, started.item, started.attempt) is request:
                request.started = replace(started, version=str(answer[1]))
                log.info("item_moved", **_names(host, request), left=started.version)
                self._forward(host, request, request.sequence, 0, wants="token")

        move = self.updates.move(started.item, started.attempt, node=host.node, epoch=host.epoch)
        self.around.report(move, started, host.node, moved)

    def _has_moved(self, node: int, item: str) -> None:
        if self.moving.get(node) == item:
            del self.moving[node]

    def _generated(self, host: HostedStage, request: Request) -> None:
        self._complete(host, request, {"tokens": request.tokens, "finish_reason": request.finish_reason})

    def _complete(self, host: HostedStage, request: Request, result: Mapping[str, object]) -> None:
        log.info("item_done", **_names(host, request), tokens=len(request.tokens))
        self.around.report(
            self.items.complete(request.started, host.node, result), request.started, host.node
        )
        self.drop(host, request.started.item)

    def _current(self, host: HostedStage, item: str, attempt: int) -> Request | None:
        request = self.requests.get((host.node, item))
        return request if request is not None and request.started.attempt == attempt else None

    def _forward(
        self,
        host: HostedStage,
        request: Request,
        ids: Sequence[int],
        position: int,
        *,
        wants: str,
        targets: Tensor | None = None,
    ) -> None:
        started, sampling = request.started, request.sampling
        frame = RunForward(
            node=host.node,
            stage=0,
            epoch=host.epoch,
            item=started.item,
            attempt=started.attempt,
            version=started.version,
            position=position,
            wants=wants,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        tensors = (torch.tensor([list(ids)]),) if targets is None else (torch.tensor([list(ids)]), targets)
        self.forward(host, frame, tensors, release=_nothing, at=self.now())

    # ---- steps, at every stage
    def forward(
        self,
        host: HostedStage,
        frame: RunForward,
        tensors: Sequence[Tensor],
        *,
        release: Callable[[], None],
        at: float,
    ) -> None:
        """Schedule a stage's share of a forward pass."""
        num_tokens, is_rebuilt = tensors[0].shape[1], False
        if frame.position == 0 and frame.wants != "scores":
            is_rebuilt = host.open_cache(_cache_key(frame))

        def run() -> None:
            with torch.no_grad():
                self._run(host, frame, tensors)
            release()

        def failed(error: Exception) -> None:
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            if host.is_first:
                self.fail(host, frame.item, frame.attempt, reason)
            else:
                self._to_first(host, ForwardFailed, frame, reason=reason)

        self.around.schedule(
            Task(
                urgency=Urgency.DECODE if num_tokens == 1 or is_rebuilt else Urgency.PREFILL,
                node=host.node,
                stage=host.stage,
                item=frame.item,
                version=frame.version,
                ready_at=at,
                run=run,
                failed=failed,
            )
        )

    def _run(self, host: HostedStage, frame: RunForward, tensors: Sequence[Tensor]) -> None:
        if host.is_first and self._current(host, frame.item, frame.attempt) is None:
            return  # cancelled, or the node started afresh, while this step waited
        model = host.versions[frame.version]
        source = tensors[0]
        positions_T = torch.arange(frame.position, frame.position + source.shape[1])
        cache = host.caches.get(_cache_key(frame))
        if cache is None and frame.wants != "scores":
            return  # released while this step waited
        hidden_BTD = model(source, positions_T, cache)
        if not host.is_last:
            following = replace(frame, stage=host.stage + 1)
            self.around.send(host, host.stage + 1, following, (hidden_BTD, *tensors[1:]))
        elif frame.wants == "scores":
            logprobs_T = token_logprobs(model, hidden_BTD[0], tensors[1][0])
            self._to_first(host, ScoresComputed, frame, tensors=(logprobs_T,))
        elif frame.wants == "token":
            position = frame.position + source.shape[1]
            sampling = Sampling(
                temperature=frame.temperature, top_k=frame.top_k, top_p=frame.top_p, seed=frame.seed
            )
            logits_V = model.logits(hidden_BTD[:, -1])[0]
            token, logprob = choose_token(logits_V, sampling, position=position)
            self._to_first(host, TokenChosen, frame, position=position, token=token, logprob=logprob)

    def _to_first(
        self,
        host: HostedStage,
        kind: type[TokenChosen | ScoresComputed | ForwardFailed],
        frame: RunForward,
        *,
        tensors: Sequence[Tensor] = (),
        **fields: object,
    ) -> None:
        about = {
            "node": host.node,
            "stage": 0,
            "epoch": host.epoch,
            "item": frame.item,
            "attempt": frame.attempt,
        }
        self.around.send(host, 0, kind(**about, **fields), tensors)  # type: ignore[arg-type]


def _cache_key(frame: RunForward) -> CacheKey:
    return CacheKey(frame.item, frame.attempt, frame.version)


def _request(started: StartedItem, stop_ids: Sequence[int]) -> Request:
    fields = started.fields
    return Request(
        started=started,
        tokens=list(started.tokens),
        max_new_tokens=int(fields.get("max_new_tokens") or 0),
        stop_ids=frozenset() if fields.get("ignore_eos") == "1" else frozenset(stop_ids),
        sampling=Sampling(
            temperature=float(fields.get("temperature") or 0),
            top_k=int(fields.get("top_k") or 0),
            top_p=float(fields.get("top_p") or 1),
            seed=int(fields.get("seed") or 0),
        ),
    )


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


def _nothing() -> None:
    """Tokens of stage 0 come from no pooled buffer."""
