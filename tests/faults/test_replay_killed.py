"""The contract of promise 1, on real processes and real input: kill everything once while a trace is replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lemix_common.broker import connect
from lemix_common.clock import wait_until
from lemix_common.ids import Version
from lemix_common.store.cluster import MAIN_RUN
from lemix_common.store.training import Training

DATA = Path(__file__).parents[3] / "shared" / "data"
REPLAY = (
    *("--trace", DATA / "traces" / "azure2023_conv_00-20min.csv"),
    *("--text", DATA / "text" / "gsm8k_train.jsonl"),
    *("--model", DATA / "models" / "stories260K-hf"),
    *("--nodes", 2, "--stages", 3, "--minutes", 2, "--time-scale", 1, "--length-scale", 0.1),
    *("--train-every", 4, "--step-examples", 4, "--task", "generate", "--seed", 0, "--json"),
)
ITEMS = 456
VICTIMS = (*(f"worker-{i}" for i in range(6)), "coordinator", "operations", "broker")
BETWEEN_KILLS_S = 7.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there"),
]


def test_every_process_killed_once_changes_nothing(tmp_path: Path) -> None:
    """Each worker, coordinator, operations worker and broker is killed: same end for each item, same weights."""
    undisturbed = _replay(tmp_path / "undisturbed", victims=())
    disturbed = _replay(tmp_path / "disturbed", victims=VICTIMS)
    for summary in (undisturbed, disturbed):
        assert (summary["submitted"], summary["done"]) == (ITEMS, ITEMS)
        assert (summary["lost"], summary["duplicated"], summary["dead_lettered"]) == (0, 0, 0)
    assert set(disturbed["weights_sha256"].values()) == set(undisturbed["weights_sha256"].values())
    assert len(set(disturbed["weights_sha256"].values())) == 1
    _check_history(tmp_path / "disturbed" / "report")


def _replay(folder: Path, *, victims: tuple[str, ...]) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "lemix", "replay", *map(str, REPLAY)]
    command += ["--report", str(folder / "report"), "--keep-data", str(folder / "data")]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)
        try:
            for when, victim in enumerate(_when_due(process, folder / "data", victims)):
                print(f"{time.time():.1f} kill {when}: {victim}")
            assert process.wait(timeout=600) == 0, (folder / "err").read_text()
        finally:
            process.kill()
            process.wait()
    summary: dict[str, Any] = json.loads((folder / "out").read_text())
    return summary


def _when_due(process: subprocess.Popen[bytes], data_dir: Path, victims: tuple[str, ...]) -> Iterator[str]:
    """Kill one after another, from the fifth committed step on, each when the one before is back."""
    if not victims:
        return
    announced = data_dir / "cluster.json"
    wait_until(announced.exists, what="the cluster is announced", timeout_s=60.0)
    training = Training(connect(json.loads(announced.read_text())["url"]), MAIN_RUN)
    wait_until(lambda: training.state().committed >= 5, what="five committed steps", timeout_s=120.0)
    for victim in victims:
        assert process.poll() is None, "the replay ended before the last kill"
        begun = time.monotonic()
        pid = json.loads(announced.read_text())["processes"][victim]
        os.kill(pid, signal.SIGKILL)
        yield victim
        _wait_for_successor(announced, victim, pid, begun)
    training.broker.client.close()


def _wait_for_successor(announced: Path, victim: str, pid: int, begun: float) -> None:
    def is_back() -> bool:
        successor = json.loads(announced.read_text())["processes"].get(victim)
        return successor not in (None, pid) and time.monotonic() - begun >= BETWEEN_KILLS_S

    wait_until(is_back, what=f"{victim} is started again", timeout_s=60.0)


def _check_history(report: Path) -> None:
    """What clients saw, checked from the raw lines and not from the summary."""
    lines = [json.loads(line) for line in (report / "history.jsonl").read_text().splitlines()]
    ends: Counter[str] = Counter()
    tokens: dict[str, list[int]] = defaultdict(list)
    submitted_at: dict[str, float] = {}
    ended: list[tuple[float, Version, str]] = []
    for line in lines:
        match line["event"]:
            case "submitted":
                submitted_at.setdefault(line["item"], line["t"])
            case "token":
                tokens[line["item"]].append(line["index"])
            case "done" | "failed" | "cancelled":
                ends[line["item"]] += 1
                ended.append((line["t"], Version.parse(line["weights_version"]), line["item"]))
    assert len(ends) == ITEMS
    assert set(ends.values()) == {1}, "exactly one end for each item"
    for item, indices in tokens.items():
        assert indices == list(range(len(indices))), f"{item}: a token twice or missing"
    ended.sort()
    newest = _running_newest(ended)
    for _, version, item in ended:
        before = [seen for at, seen in newest if at < submitted_at[item]]
        assert not before or version >= before[-1], (
            f"{item} names an older version than an item that had ended"
        )
    steps = [json.loads(line) for line in (report / "steps.jsonl").read_text().splitlines()]
    trained = Counter(item for step in steps for item in step["items"])
    assert set(trained.values()) == {1}
    assert len(trained) == ITEMS // 4
    assert all(later["step"] == earlier["step"] + 1 for earlier, later in pairwise(steps))


def _running_newest(ended: list[tuple[float, Version, str]]) -> list[tuple[float, Version]]:
    newest: list[tuple[float, Version]] = []
    for at, version, _ in ended:
        newest.append((at, max(version, newest[-1][1]) if newest else version))
    return newest
