"""A cluster that learns in steps of two examples, and what tests of going back do with it."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import COORDINATOR, InProcessCluster, committed, in_process_cluster
from lemix import Client, Future, TrainItem
from lemix.answers import Trained
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.versions import Versions
from mortality import KillPoint
from tiny_model import WORDS

STEP_EXAMPLES = 2


def settings_of(folder: Path, **changes: object) -> ClusterSettings:
    """Of a cluster that checkpoints only when asked."""
    known: dict[str, Any] = {"step_examples": STEP_EXAMPLES, "checkpoint_every": 1000, "learning_rate": 1e-2}
    return ClusterSettings(model=str(folder), **(known | changes))


def examples(name: str, steps: int) -> list[TrainItem]:
    """Those of some steps; another name, other examples."""
    draw = random.Random(name)
    return [
        TrainItem(_ids(draw, 12), _ids(draw, 20), item_id=f"{name}-{index}")
        for index in range(steps * STEP_EXAMPLES)
    ]


def _ids(draw: random.Random, most: int) -> list[int]:
    return [draw.randrange(3, len(WORDS)) for _ in range(draw.randint(1, most))]


@dataclass
class Learning:
    """A running cluster and its client."""

    cluster: InProcessCluster
    client: Client

    @property
    def broker(self) -> Broker:
        """The cluster's."""
        return self.cluster.broker

    def submit(self, name: str, steps: int) -> list[Future[Trained]]:
        """Submit the examples of some steps."""
        return [self.client.submit(example) for example in examples(name, steps)]

    def learn(self, name: str, steps: int) -> list[Trained]:
        """Learn them, and have them served."""
        futures = self.submit(name, steps)
        wait_until(
            lambda: self.cluster.replace_dead() == [] and all(future.done() for future in futures),
            what="the examples are learned",
            timeout_s=40,
        )
        self.calm()
        return [future.result(0) for future in futures]

    def calm(self) -> None:
        """Wait until every stage is ready and at the committed step, whoever has to be started again for it."""

        def is_calm() -> bool:
            self.cluster.replace_dead()
            versions, step = Versions(self.broker), committed(self.broker)
            served = int(versions.live()["served"].partition(".")[2])
            is_still = not versions.in_progress() and served == step
            return is_still and self.cluster.is_ready() and self.cluster.is_trained()

        wait_until(is_calm, what="the cluster is calm", timeout_s=30)

    def checkpoint(self) -> Path:
        """Write a checkpoint now; returns its directory."""
        versions, operation = Versions(self.broker), f"checkpoint-{uuid.uuid4().hex[:8]}"
        root = self.cluster.data_dir / "checkpoints"
        versions.open(operation, "checkpoint", run=MAIN_RUN, optimizer=True, root=str(root))
        wait_until(
            lambda: versions.operation(operation).get("state") == "sealed", what="sealed", timeout_s=20
        )
        return Path(versions.operation(operation)["directory"])

    def served_sha256(self) -> str:
        """Of the weights that are served, as their files were sealed."""
        versions = Versions(self.broker)
        return versions.version(versions.live()["served"])["sha256"]


@contextmanager
def learning(broker: Broker, folder: Path, data_dir: Path, **changes: object) -> Iterator[Learning]:
    """Such a cluster; on a broker and a directory that had one before, it goes on with that."""
    with in_process_cluster(broker, settings_of(folder, **changes), data_dir) as (cluster, client):
        yield Learning(cluster, client)


def arm(cluster: InProcessCluster, who: str, point: KillPoint) -> None:
    """Have a worker's slot or the coordinator die at its next such call."""
    hosted = cluster.coordinators[-1] if who == COORDINATOR else cluster.workers[who]
    hosted.broker._calls.clear()
    hosted.broker.kill_point = point
