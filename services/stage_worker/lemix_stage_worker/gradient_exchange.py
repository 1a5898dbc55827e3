"""What stages tell of a step's gradients: shards' sums among nodes, a tied embedding's halves, the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lemix_common.messages import AddShardGradients, AddTiedGradient, Frame
from lemix_common.store.training import GradientReport
from lemix_stage_worker.hosted_stage import HostedStage
from lemix_stage_worker.model.skeleton import HEAD_WEIGHT
from lemix_stage_worker.step_work import StepWork


class Channels(Protocol):
    """Where gradients go."""

    def send(self, host: HostedStage, stage: int, frame: Frame, tensors: Sequence[Tensor] = ()) -> None:
        """To another stage of the host's node."""

    def send_to_node(self, node: int, epoch: int, frame: Frame, tensors: Sequence[Tensor]) -> None:
        """To the same stage of another node."""

    def gradients_ready(self, host: HostedStage, step: int, attempt: int, report: GradientReport) -> None:
        """Report this stage's gradients."""


@dataclass(frozen=True, slots=True)
class GradientExchange:
    """One stage's part in the sum of a step's gradients."""

    host: HostedStage
    channels: Channels
    is_alone: bool
    """The node learns from its own microbatches only."""

    def share(self, work: StepWork, shard: int, gradients: list[Tensor]) -> None:
        """Give a finished shard's gradients to every member's same stage."""
        notice, host = work.notice, self.host
        for node, epoch in zip(notice.members, notice.epochs, strict=True):
            if node != host.node and not self.is_alone:
                about = address(host, work, host.stage) | {"node": node, "epoch": epoch}
                self.channels.send_to_node(node, epoch, AddShardGradients(**about, shard=shard), gradients)
        work.add_shard(shard, gradients)

    def conclude(self, work: StepWork) -> None:
        """With every shard in (and a tied embedding's other half), report the gradients."""
        summed, state = work.summed, self.host.training
        if summed is None or work.total is not None or work.weights is None or state is None:
            return
        gradients = dict(zip(work.weights.leaves(), summed, strict=True)) if summed else {}
        if not self._with_tied(work, gradients):
            return
        work.total = gradients
        report = work.report(state.squares(gradients))
        self.channels.gradients_ready(self.host, work.notice.step, work.notice.attempt, report)

    def _with_tied(self, work: StepWork, gradients: dict[str, Tensor]) -> bool:
        """Sum a tied embedding's two gradients, embedding first; False while the other one isn't here."""
        host = self.host
        if not gradients or not host.source.is_tied or not (host.is_first or host.is_last):
            return True
        embedding = host.source.embedding_name
        if host.stages == 1:
            gradients[embedding] = gradients[embedding] + gradients.pop(HEAD_WEIGHT)
            return True
        own, other_stage = (embedding, host.stages - 1) if host.is_first else (HEAD_WEIGHT, 0)
        if not work.sent_tied:
            work.sent_tied = True
            frame = AddTiedGradient(**address(host, work, other_stage))
            self.channels.send(host, other_stage, frame, (gradients[own],))
        if work.tied is None:
            return False
        first, last = (gradients[own], work.tied) if host.is_first else (work.tied, gradients[own])
        gradients[own] = first + last
        return True


def address(host: HostedStage, work: StepWork, stage: int) -> dict[str, Any]:
    """The fields by which a frame of a step finds a stage of the host's node, and its attempt there."""
    notice = work.notice
    return {
        "node": host.node,
        "stage": stage,
        "epoch": host.epoch,
        "run": notice.run,
        "step": notice.step,
        "attempt": notice.attempt,
    }
