"""A cluster as the bench `train` has it: submit steps' examples, wait for the last optimizer, read what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lemix import Client, TrainItem
from lemix_benchmarks.batches import Batch, Trained
from lemix_common.broker import Broker
from lemix_common.errors import ClusterError
from lemix_common.store.cluster import MAIN_RUN

_TIMEOUT_S: Final = 600.0
_BLOCK_S: Final = 1.0


@dataclass
class ClusterTrainer:
    """Trains on a cluster whose steps have as many examples as the batches, and follows what its stages report."""

    client: Client
    broker: Broker
    stages: int
    steps: int = 0
    """Those that were run so far."""

    def train(self, batches: Sequence[Batch]) -> Trained:
        """Run these steps, each as the cluster plans it; the losses are those of their commits."""
        numbers = range(self.steps + 1, self.steps + len(batches) + 1)
        seen = self.broker.last_id(self.broker.keys.events)
        self.client.train_many(
            TrainItem(example.prompt, example.reference) for batch in batches for example in batch
        )
        ended = self._end_of(numbers[-1], seen)
        self.steps += len(batches)
        steps = [self.broker.hash(self.broker.keys.step(MAIN_RUN, number)) for number in numbers]
        _require_whole(batches, steps)
        return Trained(
            ended - float(steps[0]["planned_at"]),
            tuple(float(step["loss"]) for step in steps),
        )

    def _end_of(self, step: int, seen: str) -> float:
        """When the step's optimizer had run on every stage, as soon as all have reported it."""
        ends: dict[int, float] = {}
        deadline = time.monotonic() + _TIMEOUT_S
        while len(ends) < self.stages:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"step {step} wasn't trained within {_TIMEOUT_S:g} s: see the logs of the workers"
                )
            for entry in self.broker.read({self.broker.keys.events: seen}, block_s=_BLOCK_S):
                seen = entry.id
                spans: list[dict[str, Any]] = json.loads(entry.fields["spans"])
                ends |= {
                    span["stage"]: span["end"]
                    for span in spans
                    if span["cat"] == "optimizer" and span["item"] == f"{MAIN_RUN}:{step}"
                }
        return max(ends.values())


def _require_whole(batches: Sequence[Batch], steps: Sequence[Mapping[str, str]]) -> None:
    """`ClusterError` if the cluster cut the examples into other steps: the losses would be of something else."""
    for batch, step in zip(batches, steps, strict=True):
        asked = sum(len(example.reference) for example in batch)
        if int(step["reference_tokens"]) != asked:
            raise ClusterError(
                f"a step has {step['reference_tokens']} reference tokens, its batch {asked}: "
                "the cluster makes its steps of another number of examples"
            )
