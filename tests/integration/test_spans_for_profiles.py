"""What workers report of their work is what a profile predicts by."""

from __future__ import annotations

from pathlib import Path

from clusters import in_process_cluster
from lemix import ScoreItem, TrainItem
from lemix_common.broker import connect
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_coordinator.scheduling.correction import KINDS, Corrections
from lemix_studies.spans import Span, recent_spans
from tiny_model import write_tiny_llama
from toy_profile import toy_profile

PATIENCE_S = 20.0


def test_spans_say_tokens_and_contexts(server: RunningBroker, tmp_path: Path) -> None:
    """Of a score and of a microbatch on both stages, so that every line but the decodes' is corrected."""
    model = write_tiny_llama(tmp_path / "tiny")
    settings = ClusterSettings(model=str(model), nodes=1, stages=2, step_examples=2, microbatches=1)
    broker = connect(server.url, "spans", patience_s=PATIENCE_S)
    with in_process_cluster(broker, settings, tmp_path / "data") as (_, client):
        for future in [client.submit(TrainItem([3, 4, 5], [6, 7])), client.submit(TrainItem([3, 4], [5]))]:
            future.result(PATIENCE_S)
        client.submit(ScoreItem([3, 4, 5, 6], [7, 8])).result(PATIENCE_S)
        told: dict[tuple[int, str], Span] = {}

        def all_told() -> bool:
            told.update({(span["stage"], span["cat"]): span for span in recent_spans(broker, None)})
            return {(stage, kind) for stage in (0, 1) for kind in KINDS if kind != "decode"} <= told.keys()

        wait_until(all_told, what="both stages report every kind", timeout_s=PATIENCE_S)
    for stage in (0, 1):
        prefill, forward = told[stage, "prefill"], told[stage, "training_forward"]
        assert (prefill["tokens"], prefill["contexts"]) == (5, 25)
        assert (forward["tokens"], forward["contexts"]) == (8, 25 + 9)
    known = Corrections().noted(toy_profile(2), told.values()).by_stage_and_kind
    assert {kind for _, kind in known} >= {"prefill", "training_forward", "training_backward"}
    for key in broker.client.scan_iter(match=f"{broker.keys.prefix}*"):
        broker.client.delete(key)
    broker.client.close()
