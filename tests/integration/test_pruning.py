"""Old checkpoints go, those in use and what is being written stay."""

from __future__ import annotations

import os
from pathlib import Path

from lemix_common.broker import Broker
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.rollbacks import Rollbacks
from lemix_coordinator.operations.transitions import LEFTOVER_S, prune_checkpoints


def test_the_newest_and_those_in_use_stay(broker: Broker, tmp_path: Path) -> None:
    """By version, not by the age of their files, which a backup may have changed; the model itself is no checkpoint."""
    keys, known = broker.keys, {f"0.{step}": tmp_path / f"0.{step}" for step in (9, 10, 11, 12)}
    for directory in known.values():
        directory.mkdir()
    os.utime(known["0.9"], (2e9, 2e9))
    recorded = {"0.0": ""} | {version: str(directory) for version, directory in known.items()}
    for version, place in recorded.items():
        broker.client.hset(keys.checkpoints(MAIN_RUN), version, place)
    broker.client.hset(keys.run(MAIN_RUN), "checkpoint_directory", str(known["0.10"]))
    rollbacks = Rollbacks(broker, MAIN_RUN)
    prune_checkpoints(rollbacks, tmp_path, keep=2, now=2e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.10", "0.11", "0.12"]
    assert [str(version) for version in rollbacks.checkpoints()] == ["0.0", "0.10", "0.11", "0.12"]
    broker.client.hset(keys.run(MAIN_RUN), "checkpoint_directory", str(known["0.12"]))
    prune_checkpoints(rollbacks, tmp_path, keep=2, now=2e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.11", "0.12"]


def test_what_killed_writers_left_goes_after_a_while(broker: Broker, tmp_path: Path) -> None:
    """Not before: it may still be written, or sealed and not yet recorded. What isn't named as ours is somebody's."""
    old = {".writing-c-1": LEFTOVER_S + 1, "0.7": LEFTOVER_S + 1, "0.7 copy": LEFTOVER_S + 1}
    for name, age_s in (old | {".writing-d-1": 5.0, "0.8": 5.0}).items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age_s, 1e9 - age_s))
    prune_checkpoints(Rollbacks(broker, MAIN_RUN), tmp_path, keep=2, now=1e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-d-1", "0.7 copy", "0.8"]
