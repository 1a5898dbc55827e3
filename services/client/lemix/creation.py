"""A cluster that is published on a broker without starting a process: for machines where others start them.

`lemix up` begins with the same checks. Doing it again changes nothing; other settings are taken up by processes that
start afresh (see `Cluster.create`).
"""

from __future__ import annotations

from lemix.data_dir import NO_SUPERVISOR, DataDir, RunningCluster
from lemix.model_folder import ModelFolder
from lemix_common.broker import Broker
from lemix_common.errors import BadInput, ModelError
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster

_SAME_MODEL = ("family", "num_layers", "vocab_size", "tokenizer_sha256")


def create_cluster(
    broker: Broker, url: str, settings: ClusterSettings, model: ModelFolder, directory: DataDir
) -> None:
    """Publish settings and model, and say in the data directory where the cluster is."""
    require_continuable(broker, settings, model)
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
    Cluster(broker).create(settings, model.fields(), model.tokenizer)


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
    before = Cluster(broker).settings().nodes
    left = {node: broker.client.xlen(broker.keys.work(node)) for node in range(settings.nodes, before)}
    if any(left.values()):
        node = next(node for node, num_items in left.items() if num_items)
        raise BadInput(
            f"nodes = {settings.nodes}: node {node} still has {left[node]} items that have not ended; "
            f"go on with {before} nodes until they have"
        )
