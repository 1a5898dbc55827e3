"""What bounds the training tax: a request that is ready waits for one piece of training, and that is reported."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from clusters import fresh_broker, in_process_cluster
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.inbox import Finished
from lemix_stage_worker.layer_passes import LayerPass
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.self_check import build_stages
from lemix_stage_worker.model.source import open_model
from lemix_stage_worker.ready_queue import Task, Urgency
from lemix_stage_worker.worker import Worker
from tiny_model import write_tiny_llama

PATIENCE_S = 20.0
PIECES = 4
PIECE_S = 0.02


@dataclass
class Scene:
    """Training in pieces on a real worker; a request becomes ready in the middle of the second one."""

    worker: Worker
    ran: list[str] = field(default_factory=list)
    ready_at: float = 0.0
    piece_ended_at: float = 0.0
    served_at: float = 0.0
    is_over: threading.Event = field(default_factory=threading.Event)

    def train(self) -> Iterator[None]:
        """A microbatch's backward, a layer a piece."""
        for piece in range(PIECES):
            if piece == 1:
                self.ready_at = self.worker.now()
                self.later(lambda: self.worker.schedule(self.task("request", Urgency.DECODE, self.serve)))
            self.ran.append(f"layer {piece}")
            _compute(PIECE_S)
            if piece == 1:
                self.piece_ended_at = self.worker.now()
            yield
        self.is_over.set()

    def serve(self) -> None:
        """A request's token."""
        self.served_at = self.worker.now()
        self.ran.append("request")

    def task(self, item: str, urgency: Urgency, run: Callable[[], Iterator[None] | None]) -> Task:
        """Work on the worker's stage, ready now or, for the request, when its frame came."""
        return Task(
            urgency=urgency,
            node=0,
            stage=0,
            item=item,
            version="0.0",
            ready_at=self.ready_at,
            run=run,
            failed=lambda error: self.ran.append(f"{item}: {error}"),
        )

    def later(self, then: Callable[[], None]) -> None:
        """What arrives at the compute loop from another thread."""
        self.worker.inbox.post(Finished(then))


def _compute(seconds: float) -> None:
    """Be busy: nothing interrupts a layer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def blocked_s(broker: Broker, item: str) -> list[float]:
    """What the worker reported that an item's steps waited behind training."""
    entries: Any = broker.client.xrange(broker.keys.events)
    batches = [json.loads(fields["spans"]) for _, fields in entries]
    return [span["blocked_s"] for batch in batches for span in batch if span["item"] == item]


def test_a_request_waits_for_one_piece_of_training(server: RunningBroker, tmp_path: Path) -> None:
    """It runs at the next safepoint, before the rest of the microbatch; the piece's rest is what it waited."""
    settings = ClusterSettings(model=str(write_tiny_llama(tmp_path / "model")))
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, settings, tmp_path / "data") as (cluster, _),
    ):
        worker = cluster.workers["worker-0"].worker
        assert worker is not None
        scene = Scene(worker)
        scene.later(lambda: worker.schedule(scene.task("main:1:0", Urgency.BACKWARD, scene.train)))
        assert scene.is_over.wait(PATIENCE_S)
        wait_until(lambda: bool(blocked_s(broker, "request")), what="it is reported", timeout_s=PATIENCE_S)
        (waited_s,) = blocked_s(broker, "request")
    assert scene.ran == ["layer 0", "layer 1", "request", "layer 2", "layer 3"]
    rounding_s = 2e-6
    assert scene.piece_ended_at - scene.ready_at - rounding_s <= waited_s
    assert waited_s <= scene.served_at - scene.ready_at + rounding_s


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_piece_of_training_is_one_layer(tmp_path: Path, num_stages: int) -> None:
    """A microbatch can be interrupted after each of the stage's layers, on the way back after each half of one."""
    source = open_model(write_tiny_llama(tmp_path / "model", layers=6))
    for stage in build_stages(source, cut_model(source, num_stages)):
        num_layers = 6 // num_stages
        layers = LayerPass(stage.parts())
        arriving = torch.tensor([[3, 4, 5]]) if stage.is_first else torch.ones(1, 3, source.hidden_size)
        assert len(list(layers.forward(arriving))) == num_layers
        assert len(list(layers.backward(torch.ones_like(layers.output)))) == 2 * num_layers
