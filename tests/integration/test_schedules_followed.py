"""What stages do, by what they report, is what their schedule says."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from clusters import fresh_broker, in_process_cluster
from lemix import TrainItem
from lemix_common.broker import Broker
from lemix_common.clock import wait_until
from lemix_common.schedules import Work
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_stage_worker.course import pieces_of
from numerics.subjects import GENERATED, random_tensors, write_model
from references import write_number_tokenizer

MICROBATCHES = 4
LETTER = {"training_forward": "F", "training_backward": "B", "optimizer": "O"}


def orders(server: RunningBroker, folder: Path, steps: int = 1, **settings: Any) -> list[list[str]]:
    """Train some steps of four examples; what each stage did, as ``F0``, ``B0``, and ``O`` for the optimizer."""
    config = GENERATED["llama"]
    model = write_model(folder / "model", config, random_tensors(config))
    write_number_tokenizer(model, config.vocab_size)
    chosen = ClusterSettings(model=str(model), step_examples=MICROBATCHES, **settings)
    with (
        fresh_broker(server) as broker,
        in_process_cluster(broker, chosen, folder / "data") as (_, client),
    ):
        for index in range(steps * MICROBATCHES):
            client.submit(TrainItem([4, 5, 6], [7 + index % 8] * (1 + index % 3)))
        client.flush(30)
        wanted = steps * chosen.stages
        wait_until(
            lambda: sum(span["cat"] == "optimizer" for span in _spans(broker)) == wanted,
            what="every stage reported its optimizers",
            timeout_s=10,
        )
        spans = sorted(_spans(broker), key=lambda span: float(span["start"]))
    names = [[_name(span) for span in spans if span["stage"] == stage] for stage in range(chosen.stages)]
    return [
        [name for name, _ in groupby(each)] for each in names
    ]  # cut at a safepoint, a piece has two spans


def _spans(broker: Broker) -> list[dict[str, Any]]:
    entries: Any = broker.client.xrange(broker.keys.events)
    return [span for _, fields in entries for span in json.loads(fields["spans"]) if span["cat"] in LETTER]


def _name(span: dict[str, Any]) -> str:
    step, _, microbatch = span["item"].partition(":")[2].partition(":")
    at = (int(step) - 1) * MICROBATCHES + int(microbatch or 0)
    return LETTER[span["cat"]] + (str(at) if microbatch else "")


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "s-pp", "stages": 3},
        {"schedule": "gpipe", "stages": 3},
        {"schedule": "1f1b", "stages": 3},
        {"schedule": "interleaved", "stages": 4, "workers": 2},
    ],
    ids=lambda settings: settings["schedule"],
)
def test_a_stage_works_in_the_order_of_its_schedule(
    server: RunningBroker, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Whatever arrives first."""
    found = orders(server, tmp_path, **settings)
    for stage, order in enumerate(found):
        pieces = pieces_of(
            settings["schedule"],
            stage=stage,
            stages=settings["stages"],
            workers=settings.get("workers", settings["stages"]),
            step=1,
            microbatches=range(MICROBATCHES),
        )
        assert order == [*(f"{piece.work}{piece.microbatch}" for piece in pieces), "O"]


def test_weights_come_last_with_zero_bubble(server: RunningBroker, tmp_path: Path) -> None:
    """Forwards and the inputs' gradients in the order of the schedule; a weights' gradient only where others wait."""
    found = orders(server, tmp_path, schedule="zero-bubble", stages=3)
    for stage, order in enumerate(found):
        pieces = pieces_of(
            "zero-bubble", stage=stage, stages=3, workers=3, step=1, microbatches=range(MICROBATCHES)
        )
        assert [name for name in order if name[0] == "F"] == [
            f"F{piece.microbatch}" for piece in pieces if piece.work is Work.FORWARD
        ]
        halves = [name for name in order if name[0] == "B"]
        assert [name for at, name in enumerate(halves) if name not in halves[:at]] == ["B0", "B1", "B2", "B3"]


def test_steps_overlap_with_a_pp(server: RunningBroker, tmp_path: Path) -> None:
    """A stage goes forward with the next step before the last one's optimizer ran, and holds its share at most."""
    found = orders(server, tmp_path, steps=12, schedule="a-pp", stages=3)
    overlapping = 0
    for stage, order in enumerate(found):
        ran, held = 0, 0
        for name in order:
            ran += name == "O"
            held += {"F": 1, "B": -1, "O": 0}[name[0]]
            assert 0 <= held <= 3 - stage
            if name[0] == "F":
                step = int(name[1:]) // MICROBATCHES
                assert step - 1 <= ran <= step
                overlapping += ran == step - 1
        for work in "FB":
            assert [n for n in order if n[0] == work] == [f"{work}{m}" for m in range(12 * MICROBATCHES)]
    assert overlapping


def test_a_forward_waits_for_memory(server: RunningBroker, tmp_path: Path) -> None:
    """Where activations of two microbatches don't fit, each goes forward and back before the next one begins."""
    found = orders(server, tmp_path, schedule="gpipe", stages=2, activation_bytes=1)
    assert found == [[*(n for m in range(4) for n in (f"F{m}", f"B{m}")), "O"]] * 2
