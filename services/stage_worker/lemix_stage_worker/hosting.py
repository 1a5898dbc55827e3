"""The stages this worker hosts: taken up as the placement says, built, made ready, and given new versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import structlog

from lemix_common.broker import Broker
from lemix_common.errors import Fenced, WeightsDamaged
from lemix_common.ids import BASE_VERSION, Version
from lemix_common.messages import LoadTraining
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.items import Items
from lemix_common.store.rollbacks import Rollbacks
from lemix_common.store.training import Training
from lemix_common.store.versions import Versions
from lemix_stage_worker.activation_memory import predict_memory, training_way
from lemix_stage_worker.background import Background
from lemix_stage_worker.device import device_memory_bytes
from lemix_stage_worker.hosted_stage import (
    BASE_DIRECTORY,
    HostedStage,
    Neighbourhood,
    build_template,
    load_training,
    load_version,
    training_on,
)
from lemix_stage_worker.inbox import Inbox
from lemix_stage_worker.links import Links
from lemix_stage_worker.memory import peak_rss_bytes
from lemix_stage_worker.model.packed_linear import pack_stage
from lemix_stage_worker.model.paged_attention import num_kv_blocks
from lemix_stage_worker.model.source import ModelSource
from lemix_stage_worker.model.stage import StageModel
from lemix_stage_worker.puller import Puller
from lemix_stage_worker.training_state import TrainingState

log = structlog.get_logger()

Position = tuple[int, int]
"""(node, stage)."""


class Owner(Protocol):
    """Who computes on the hosted stages."""

    def node_renewed(self, node: int) -> None:
        """A node starts afresh: nothing of its earlier epoch counts any more."""

    def stage_built(self, host: HostedStage) -> None:
        """A stage is here, not yet ready."""

    def stage_gone(self, position: Position) -> None:
        """A stage is another worker's now."""

    def stage_ready(self, host: HostedStage) -> None:
        """A stage is ready in its epoch: frames of that epoch can be taken."""

    def training_at(self, host: HostedStage, step: int) -> None:
        """A stage's training state moved on while its readiness was reported."""


@dataclass
class Hosting:
    """Owned by the compute loop; whatever takes long is done in the background."""

    name: str
    broker: Broker
    settings: ClusterSettings
    source: ModelSource
    layers: tuple[range, ...]
    links: Links
    inbox: Inbox
    background: Background
    owner: Owner
    stages: dict[Position, HostedStage] = field(default_factory=dict)
    neighbours: dict[int, Neighbourhood] = field(default_factory=dict)
    """Of every node, as last read."""
    pullers: dict[int, Puller] = field(default_factory=dict)
    _lost: dict[int, int] = field(default_factory=dict)
    """By node, the last epoch in which messages were lost."""
    _building: set[Position] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cluster, self.items = Cluster(self.broker), Items(self.broker)
        self.training, self.versions = Training(self.broker, MAIN_RUN), Versions(self.broker)

    # ---- placement
    def read_placement(self, node: int) -> None:
        """Read who hosts the node now, and where they are reached, then take it up."""

        def read() -> tuple[dict[str, str], dict[str, str]]:
            fields = self.broker.hash(self.broker.keys.node(node))
            hosts = [fields.get(f"stage:{stage}", "") for stage in range(self.settings.stages)]
            about = self.broker.hashes(self.broker.keys.worker(worker) for worker in hosts)
            return fields, {w: known.get("address", "") for w, known in zip(hosts, about, strict=True)}

        self.background.do(read, lambda answer: self._take_placement(node, *answer))

    def peers(self) -> set[str]:
        """The workers that the placement names."""
        return {worker for known in self.neighbours.values() for worker, _ in known.hosts}

    def peer_gone(self, peer: str) -> None:
        """A neighbour's connection ended: its nodes may have lost messages."""
        for node, known in self.neighbours.items():
            if any(worker == peer for worker, _ in known.hosts):
                self.link_lost(node, known.epoch, peer)

    def link_lost(self, node: int, epoch: int, peer: str) -> None:
        """Have a node start afresh, unless it has done so since ``epoch``."""
        self._lost[node] = max(epoch, self._lost.get(node, epoch))
        self.background.do(lambda: self.cluster.link_lost(node, epoch, peer))

    def is_lost(self, node: int, epoch: int) -> bool:
        """Whether messages of this epoch were lost: what comes after them stands on what isn't there."""
        return epoch <= self._lost.get(node, epoch - 1)

    def each_first_stage(self, act: Callable[[HostedStage], None]) -> None:
        """Do something with each stage 0 here."""
        for host in list(self.stages.values()):
            if host.is_first:
                act(host)

    def close(self) -> None:
        """Pull no more."""
        for puller in self.pullers.values():
            puller.stop()

    def _take_placement(self, node: int, fields: Mapping[str, str], addresses: Mapping[str, str]) -> None:
        epoch = int(fields.get("epoch", 0))
        known = self.neighbours.get(node)
        if not epoch or (known is not None and epoch <= known.epoch):
            return
        hosts = [fields.get(f"stage:{stage}", "") for stage in range(self.settings.stages)]
        self.neighbours[node] = Neighbourhood(epoch, tuple((w, addresses.get(w, "")) for w in hosts))
        self.links.forget({address for known in self.neighbours.values() for _, address in known.hosts})
        if puller := self.pullers.pop(node, None):
            puller.stop()
        self.owner.node_renewed(node)
        for stage, worker in enumerate(hosts):
            position = (node, stage)
            host = self.stages.get(position)
            if worker != self.name:
                self.stages.pop(position, None)
                self.owner.stage_gone(position)
            elif host is not None:
                host.epoch, host.is_ready = epoch, False
                host.opened.clear()
                self._report_ready(host)
            elif position not in self._building:  # what is being built takes the newest epoch at its end
                self._build(node, stage)

    # ---- a stage's beginning
    def _build(self, node: int, stage: int) -> None:
        def built(host: HostedStage) -> None:
            self._building.discard((node, stage))
            known = self.neighbours[node]
            if known.hosts[stage][0] != self.name:
                return
            host.epoch = known.epoch
            self.stages[node, stage] = host
            self.owner.stage_built(host)
            log.info(
                "stage_built",
                node=node,
                stage=stage,
                layers=str(self.layers[stage]),
                epoch=host.epoch,
                weight_bytes=host.template.weight_bytes,
                peak_rss_bytes=peak_rss_bytes(),
            )
            self._pack(host)

        def failed(error: Exception) -> None:
            if isinstance(error, Fenced):
                self._build(node, stage)
            else:
                self._give_up(node, stage, error)

        self._building.add((node, stage))
        self.background.do(lambda: self._load_stage(node, stage), built, failed)

    def _load_stage(self, node: int, stage: int) -> HostedStage:
        """A stage with every live version, and the training state of step 0 if that is where training is."""
        template = build_template(self.source, stage, self.layers)
        live = self.versions.live()
        names = {live[name] for name in ("served", "draining", "preparing") if live.get(name)}
        served = {version: self._load_version(template, version) for version in names}
        run, training = self.training.state(), None
        if run.committed == 0 and node in self.settings.training_nodes:
            base = served.get(str(BASE_VERSION)) or load_version(self.source, template, BASE_DIRECTORY)
            at = Version(run.lineage, 0)
            training = training_on(base, template, at, overlaps=self.settings.overlaps_steps)
            self._tell_memory(training, node, stage)
        return HostedStage(
            node=node,
            stage=stage,
            stages=self.settings.stages,
            source=self.source,
            template=template,
            versions=served,
            training=training,
            num_blocks=self._num_blocks(),
        )

    def _num_blocks(self) -> int:
        """Of the key-value cache of each stage."""
        settings = self.settings
        return num_kv_blocks(
            self.source, self.layers, max_running=settings.max_running, kv_bytes=settings.kv_bytes
        )

    def _pack(self, host: HostedStage) -> None:
        """Make the versions ready to be computed with; training, which may share them, keeps them as they are."""
        stored = dict(host.versions)

        def pack() -> dict[str, StageModel]:
            return {version: pack_stage(shell) for version, shell in stored.items()}

        def packed(shells: Mapping[str, StageModel]) -> None:
            host.versions.update(
                (version, shells[version]) for version in shells.keys() & host.versions.keys()
            )
            self._report_ready(host)

        self.background.do(pack, packed)

    def _report_ready(self, host: HostedStage) -> None:
        """Say that the stage can serve in its epoch; versions that became live meanwhile are loaded first."""
        epoch, layers = host.epoch, self.layers[host.stage]
        training = host.training.version if host.training is not None else None

        def report() -> tuple[dict[str, StageModel], list[str]]:
            missing, retired = self.cluster.stage_ready(
                self.name,
                node=host.node,
                stage=host.stage,
                epoch=epoch,
                training=training,
                versions=list(host.versions),
                layers=(layers.start, layers.stop - 1),
                memory_bytes=host.memory_bytes,
            )
            return {version: self._load_to_serve(host.template, version) for version in missing}, retired

        def reported(answer: tuple[dict[str, StageModel], list[str]]) -> None:
            loaded, retired = answer
            host.versions.update(loaded)
            for version in retired:  # while the stage was being built
                host.versions.pop(version, None)
            if host.epoch != epoch:
                return
            if loaded:
                self._report_ready(host)
                return
            host.is_ready = True
            if host.training is not None and host.training.version != training:  # an optimizer ran meanwhile
                self.owner.training_at(host, host.training.step)
            self.owner.stage_ready(host)
            self.pull_if_whole(host.node)

        def failed(error: Exception) -> None:
            log.warning("stage_not_ready", node=host.node, stage=host.stage, reason=str(error))
            if isinstance(error, WeightsDamaged):
                self._give_up(host.node, host.stage, error)
            elif host.epoch == epoch:
                self._report_ready(host)

        self.background.do(report, reported, failed)

    def pull_if_whole(self, node: int) -> None:
        """Begin to pull when the node's last stage is ready: an item must not be started for a stage that is lost."""
        host = self.stages.get((node, 0))
        if host is None or not host.is_ready or node in self.pullers:
            return
        epoch = host.epoch

        def is_whole() -> bool:
            fields = self.broker.hash(self.broker.keys.node(node))
            return all(fields.get(f"ready:{stage}") == str(epoch) for stage in range(host.stages))

        def pull(whole: bool) -> None:
            if whole and host.epoch == epoch and node not in self.pullers:
                puller = self.pullers[node] = Puller(
                    self.items, self.inbox, self.name, node, epoch, self.settings.max_running
                )
                puller.start()

        self.background.do(is_whole, pull)

    # ---- versions
    def prepare(self, version: str) -> None:
        """Load a sealed version into every stage here, and say so."""
        for host in self.stages.values():
            self._prepare(host, version)

    def retire(self, version: str) -> None:
        """Give a version's memory back."""
        for host in self.stages.values():
            host.versions.pop(version, None)

    def _prepare(self, host: HostedStage, version: str) -> None:
        def prepared(shell: StageModel) -> None:
            host.versions[version] = shell
            self.background.do(
                lambda: self.versions.prepared(version, node=host.node, stage=host.stage, epoch=host.epoch),
                keep,
            )

        def keep(is_wanted: bool) -> None:
            if not is_wanted:  # retired, or withdrawn, while it was loaded
                host.versions.pop(version, None)

        def failed(error: Exception) -> None:
            log.error("version_not_prepared", node=host.node, version=version, reason=str(error))
            if not isinstance(error, (Fenced, WeightsDamaged)):
                self.background.failure = error

        self.background.do(lambda: self._load_to_serve(host.template, version), prepared, failed)

    def load_training(self, host: HostedStage, notice: LoadTraining) -> None:
        """Give a stage the training state of a checkpoint."""
        epoch = host.epoch

        def loaded(state: TrainingState) -> None:
            if host.epoch == epoch:
                host.training = state
                self.owner.training_at(host, state.step)

        def failed(error: Exception) -> None:
            log.error("training_refused", node=host.node, stage=host.stage, reason=str(error))

            def refused(is_refused: bool) -> None:
                if not is_refused and host.epoch == epoch:
                    self.background.failure = error

            if isinstance(error, WeightsDamaged):
                self.background.do(lambda: self._refuse_training(notice, error), refused)
            else:  # the files went, since there is a newer checkpoint, or the disk
                self.background.failure = error

        self.background.do(lambda: self._load_state(host, notice), loaded, failed)

    def _load_state(self, host: HostedStage, notice: LoadTraining) -> TrainingState:
        state = load_training(
            self.source,
            host.template,
            notice.directory,
            Version(notice.lineage, notice.step),
            overlaps=self.settings.overlaps_steps,
        )
        self._tell_memory(state, host.node, host.stage)
        return state

    def _tell_memory(self, state: TrainingState, node: int, stage: int) -> None:
        """Say what training will take on a stage, with microbatches as long as they may be, before it takes it."""
        settings, limit = self.settings, device_memory_bytes(self.source.device)
        way = training_way(settings, stage)
        longest = (min(settings.microbatch_tokens or self.source.context_length, self.source.context_length),)
        needed = predict_memory(state.model, state.newest.activations, [longest] * way.held, way)
        log.info("training_memory_predicted", node=node, stage=stage, bytes=needed.total, **asdict(needed))
        if needed.total > limit:
            log.warning(
                "training_may_not_fit",
                node=node,
                stage=stage,
                bytes=needed.total,
                limit_bytes=limit,
                reason="use --recompute, a smaller --microbatch-tokens or --activation-bytes, or more stages",
            )

    def _refuse_training(self, notice: LoadTraining, error: WeightsDamaged) -> bool:
        """Have training stand still, and say what a user can do; False if nobody wants that checkpoint any more."""
        known = Rollbacks(self.broker, notice.run).checkpoints().items()
        before = [version for version, directory in known if directory != notice.directory]
        way_out = (
            f"bring the file back and `lemix up --resume`, or go back with `lemix rollback {before[-1]}`"
        )
        return self.versions.refuse_training(notice.run, notice.directory, f"{error}: {way_out}")

    def _load_to_serve(self, template: StageModel, version: str) -> StageModel:
        return pack_stage(self._load_version(template, version))

    def _load_version(self, template: StageModel, version: str) -> StageModel:
        """A live version's weights; `Fenced` if it isn't live any more.

        A version that isn't served yet is refused where it is damaged. One that is served may have a checkpoint, which
        has the same bits.
        """
        gone = Fenced(f"version {version} is not served any more")
        directory = self.versions.version(version).get("directory")
        if directory is None:
            raise gone
        try:
            return load_version(self.source, template, directory)
        except WeightsDamaged as error:
            self.versions.refuse(version, str(error))
            if version not in self.versions.live().values():
                raise gone from error
            copy = Rollbacks(self.broker, MAIN_RUN).checkpoints().get(Version.parse(version), directory)
            if copy == directory:
                raise
            log.warning("version_damaged", version=version, reason=str(error), instead=copy)
            return load_version(self.source, template, copy)

    def _give_up(self, node: int, stage: int, error: Exception) -> None:
        """The stage can't work here: the reason stops a cluster that starts."""
        self.cluster.stage_failed(node, stage, self.neighbours[node].epoch, str(error))
        self.background.failure = error
