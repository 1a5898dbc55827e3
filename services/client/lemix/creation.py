"""A cluster that is published on a broker without starting a process: for machines where others start them.

`lemix up` begins with the same checks. Doing it again changes nothing; other settings are taken up by processes that
start afresh (see `Cluster.create`).
"""

from __future__ import annotations

from lemix.data_dir import NO_SUPERVISOR, DataDir, RunningCluster
from lemix.held_out import read_held_out
from lemix.model_folder import ModelFolder
from lemix_common.broker import Broker
from lemix_common.errors import BadInput, ModelError
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN, Cluster
from lemix_common.store.training import Training

_SAME_MODEL = ("family", "num_layers", "vocab_size", "tokenizer_sha256")


def create_cluster(
    broker: Broker, url: str, settings: ClusterSettings, model: ModelFolder, directory: DataDir
) -> None:
    """Publish settings and model, and say in the data directory where the cluster is."""
    require_continuable(broker, settings, model)
    held_out = read_held_out(settings.gate_file, model)
    said = RunningCluster(
        url=url,
        cluster=broker.keys.cluster,
        data_dir=str(directory.path),
        pid=NO_SUPERVISOR,
        processes={},
    )
    if not directory.says(said):
        with directory.locked():
            directory.announce(said)
    Cluster(broker).create(settings, model.fields(), model.tokenizer, held_out)


def require_continuable(broker: Broker, settings: ClusterSettings, model: ModelFolder) -> None:
    """A cluster that the broker holds already can go on with this model and these settings."""
    known = broker.hash(broker.keys.model)
    if not known:
        return
    fields = model.fields()
    if any(known.get(name) != str(fields[name]) for name in _SAME_MODEL):
        raise ModelError(
            f"this cluster was started with {known.get('path')}, {model.path} is another model: "
            "go on with the first, or start afresh with another --data-dir and --cluster"
        )
    old = Cluster(broker).settings()
    run = Training(broker, MAIN_RUN).state()
    if old.overlaps_steps != settings.overlaps_steps and run.checkpoint < run.committed:
        raise BadInput(
            f"schedule = {settings.schedule}: steps {run.checkpoint + 1} to {run.committed} are in no checkpoint, and "
            f"another schedule would make other weights of them; go on with {old.schedule}, and change it after "
            "`lemix checkpoint`"
        )
    before = old.nodes
    left = {node: broker.client.xlen(broker.keys.work(node)) for node in range(settings.nodes, before)}
    if any(left.values()):
        node = next(node for node, num_items in left.items() if num_items)
        raise BadInput(
            f"nodes = {settings.nodes}: node {node} still has {left[node]} items that have not ended; "
            f"go on with {before} nodes until they have"
        )
