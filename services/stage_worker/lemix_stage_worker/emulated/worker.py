"""The stage worker over stand-ins: everything but computing is the real one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lemix_common.errors import Fenced
from lemix_common.ids import Version
from lemix_common.messages import ForwardDone, LoadTraining, RunForward, WriteShards
from lemix_stage_worker.batching import Wants
from lemix_stage_worker.emulated.emulation import Emulation
from lemix_stage_worker.emulated.stand_ins import (
    EmulatedHead,
    EmulatedLayers,
    EmulatedStage,
    EmulatedTraining,
    EmulatedWeights,
    Waiter,
    nothing_computed,
)
from lemix_stage_worker.forwarding import NO_TOKEN, Forwarding
from lemix_stage_worker.hosted_stage import HostedStage, build_template
from lemix_stage_worker.hosting import Hosting
from lemix_stage_worker.layer_passes import HeadPass, LayerPass
from lemix_stage_worker.learning import Learner
from lemix_stage_worker.model.sampling import Choice
from lemix_stage_worker.model.scoring import NO_TARGET
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.shard_files import write_shard
from lemix_stage_worker.step_work import MicrobatchPass, Row
from lemix_stage_worker.trained_weights import Weights
from lemix_stage_worker.training_state import TrainingState
from lemix_stage_worker.worker import Worker


@dataclass
class EmulatedForwarding(Forwarding):
    """Iterations that take their time."""

    emulation: Emulation = field(kw_only=True)
    waiter: Waiter = field(kw_only=True)
    since: Callable[[], float | None] = field(kw_only=True)
    """When the compute loop began with what it does now, by the waiter's clock."""

    def compute(self, host: HostedStage, frame: RunForward, tensors: Sequence[Tensor]) -> None:
        """Wait, then send on what the real stage would, with made-up tokens and scores."""
        began = self.since() or self.waiter.now()
        seconds = self.emulation.iteration_s(host.stage, frame.starts, frame.lengths)
        self.waiter.until(began + seconds)
        waited_until = self.waiter.now()
        self._send(host, frame, tensors, slowest_s=max(frame.slowest_s, seconds))
        self.waiter.done(waited_until)

    def _send(
        self, host: HostedStage, frame: RunForward, tensors: Sequence[Tensor], *, slowest_s: float
    ) -> None:
        _, blocks_N, targets_T = tensors
        if not host.is_last:
            following = replace(frame, stage=host.stage + 1, slowest_s=slowest_s)
            hidden = nothing_computed(sum(frame.lengths))
            self.around.send(host, host.stage + 1, following, (hidden, blocks_N, targets_T))
            return
        choices = [
            self._choice(host, number, start + length)
            for number, start, length, wants in zip(
                frame.numbers, frame.starts, frame.lengths, frame.wants, strict=True
            )
            if wants == Wants.TOKEN
        ]
        num_scores = int((targets_T != NO_TARGET).sum()) if len(targets_T) else 0
        scores = (torch.full((num_scores,), self.emulation.logprob),) if num_scores else ()
        done = ForwardDone(
            node=host.node,
            stage=0,
            epoch=host.epoch,
            iteration=frame.iteration,
            tokens=tuple(choice.token for choice in choices),
            logprobs=tuple(choice.logprob_text for choice in choices),
            slowest_s=slowest_s,
        )
        self.around.send(host, 0, done, scores)

    def _choice(self, host: HostedStage, number: int, position: int) -> Choice:
        opened = host.opened.get(number)
        if opened is None:
            return Choice(NO_TOKEN)
        token = self.emulation.token_of(opened.item, position)
        if not opened.chooser.sampling.logprobs:
            return Choice(token)
        return Choice(token, self.emulation.logprob, ((token, self.emulation.logprob),))


@dataclass
class EmulatedHosting(Hosting):
    """Stages without weights, which are there at once."""

    emulation: Emulation = field(kw_only=True)
    waiter: Waiter = field(kw_only=True)

    def _load_stage(self, node: int, stage: int) -> HostedStage:
        template = build_template(self.source, stage, self.layers)
        live, run = self.versions.live(), self.training.state()
        names = {live[name] for name in ("served", "draining", "preparing") if live.get(name)}
        is_at_start = run.committed == 0 and node in self.settings.training_nodes
        return EmulatedStage(
            node=node,
            stage=stage,
            stages=self.settings.stages,
            source=self.source,
            template=template,
            versions=dict.fromkeys(names, template),
            training=self._state(template, stage, Version(run.lineage, 0)) if is_at_start else None,
            num_blocks=self._num_blocks(),
            emulation=self.emulation,
        )

    def _pack(self, host: HostedStage) -> None:
        self._report_ready(host)

    def _load_version(self, template: StageModel, version: str) -> StageModel:
        if self.versions.version(version).get("directory") is None:
            raise Fenced(f"version {version} is not served any more")
        return template

    def _load_to_serve(self, template: StageModel, version: str) -> StageModel:
        return self._load_version(template, version)

    def _load_state(self, host: HostedStage, notice: LoadTraining) -> TrainingState:
        return self._state(host.template, host.stage, Version(notice.lineage, notice.step))

    def _state(self, template: StageModel, stage: int, version: Version) -> TrainingState:
        return EmulatedTraining(
            version.step,
            EmulatedWeights(
                template,
                emulation=self.emulation,
                stage=stage,
                embedding_name=self.source.embedding_name,
            ),
            self.settings.overlaps_steps,
            lineage=version.lineage,
            emulation=self.emulation,
            stage=stage,
            waiter=self.waiter,
        )


@dataclass
class EmulatedLearner(Learner):
    """Passes that take their time."""

    emulation: Emulation = field(kw_only=True)
    waiter: Waiter = field(kw_only=True)

    def layers_for(self, weights: Weights, row: Row) -> LayerPass:
        """As long as the profile says."""
        return EmulatedLayers(
            weights.parts,
            row.lengths,
            forward_s=self.emulation.forward_s(self.host.stage, row.lengths),
            backward_s=self.emulation.backward_s(self.host.stage, row.lengths),
            is_first=self.host.is_first,
            waiter=self.waiter,
        )

    def head_for(self, weights: Weights, held: MicrobatchPass) -> HeadPass:
        """Its time is the layers'."""
        output, lengths = held.layers.output, held.row.lengths
        return EmulatedHead(weights.model, output, lengths, logprob=self.emulation.logprob)


@dataclass
class EmulatedWorker(Worker):
    """One emulated accelerator."""

    emulation: Emulation = field(kw_only=True)
    waiter: Waiter = field(default_factory=Waiter)

    def make_forwarding(self) -> Forwarding:
        """Iterations that take their time."""
        return EmulatedForwarding(
            self, emulation=self.emulation, waiter=self.waiter, since=lambda: self.busy_since
        )

    def make_hosting(self) -> Hosting:
        """Stages without weights."""
        return EmulatedHosting(
            name=self.name,
            broker=self.broker,
            settings=self.settings,
            source=self.source,
            layers=self.layers,
            links=self.links,
            inbox=self.inbox,
            background=self.background,
            owner=self,
            emulation=self.emulation,
            waiter=self.waiter,
        )

    def make_learner(self, host: HostedStage) -> Learner:
        """Passes that take their time."""
        return EmulatedLearner(
            host, self.settings, self, self.now, emulation=self.emulation, waiter=self.waiter
        )

    @property
    def memory_used_bytes(self) -> int:
        """What the real one's stages would take, without keys and values."""
        return sum(host.memory_bytes for host in list(self.hosting.stages.values()))

    def write_shard(self, host: HostedStage, request: WriteShards, tensors: Mapping[str, Tensor]) -> None:
        """What says which step it is of, without a probe: nothing computes."""

        def write() -> None:
            report = write_shard(Path(request.directory), host.stage, tensors)
            self.versions.shard_written(request.operation, host.stage, request.directory, report)

        self.background.do(write)
