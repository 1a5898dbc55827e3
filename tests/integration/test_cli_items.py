from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from integration.places import Place, on_server
from integration.scripted_worker import BYTES_TOKENIZER, MODEL, ScriptedWorker
from lemix.cli.items import register
from lemix_common.server import RunningBroker
from lemix_common.store.cluster import Cluster

Run = Callable[..., Result]


@pytest.fixture
def place(server: RunningBroker) -> Iterator[Place]:
    """Commands are given a URL, so they need a real server."""
    opened = on_server(server)
    yield opened
    opened.broker.again(opened.broker.client.flushall)
    opened.broker.client.close()


@pytest.fixture
def run(server: RunningBroker, worker: ScriptedWorker) -> Iterator[Run]:
    """Runs a command while the worker works."""
    app = typer.Typer()
    register(app)

    def command(*arguments: str) -> Result:
        environment = {"LEMIX_URL": server.url, "LEMIX_CLUSTER": "test"}
        return CliRunner().invoke(app, arguments, env=environment)

    with worker.runs():
        yield command


def test_generate_shows_text(run: Run) -> None:
    """And nothing else on stdout."""
    answered = run("generate", "né", "--max-new-tokens", "6")
    assert (answered.exit_code, answered.stdout) == (0, "néné\n")


def test_json_is_one_object(run: Run) -> None:
    """With the answer and its weights."""
    scored = json.loads(run("score", "a", "b", "--json").stdout)
    assert scored["loss"] == pytest.approx(-scored["logprobs"][0])
    asked = ("generate", "ab", "--max-new-tokens", "2", "--on-update", "rebuild", "--json")
    generated = json.loads(run(*asked).stdout)
    assert generated["version_spans"] == [[0, "0.0"]]
    assert (generated["text"], generated["finish_reason"], generated["weights_version"]) == (
        "ab",
        "length",
        "0.0",
    )


def test_train_then_flush(run: Run, tmp_path: Path) -> None:
    """Rows are queued; the flush says which weights have them."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3)
    assert json.loads(run("train", str(path), "--json").stdout)["examples"] == 3
    assert json.loads(run("flush", "--json").stdout) == {"weights_version": "0.2"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["score", "", "b"], "the prompt is empty"),
        (["score", "a", ""], "the reference has no tokens"),
        (["generate", "a", "--max-new-tokens", "64"], "1 prompt + 64 new tokens = 65"),
        (["generate", "a", "--temperature", "-1"], "temperature -1.0 can't be used"),
        (["generate", "a", "--over-long", "shorten"], "--over-long shorten: use reject, truncate, split"),
        (["generate", "a", "--on-update", "redo"], "on_update 'redo': use finish or rebuild"),
        (["train", "nothing.jsonl"], "nothing.jsonl can't be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run: Run, arguments: list[str], reason: str) -> None:
    """On stderr, and nothing was queued."""
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("lemix: ")
    assert reason in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_bad_row_keeps_all_others_out(run: Run, worker: ScriptedWorker, tmp_path: Path) -> None:
    """File and line are named, for a line that can't be read and for one that doesn't fit."""
    path = tmp_path / "rows.jsonl"
    for bad, reason in (
        ("{", "not JSON"),
        (json.dumps({"prompt": "a" * 70, "reference": "b"}), "70 prompt + 1"),
    ):
        path.write_text(f'{{"prompt": "a", "reference": "b"}}\n{bad}\n')
        refused = run("train", str(path))
        assert refused.exit_code == 2
        assert f"{path}:2: {reason}" in refused.stderr
    assert not worker.broker.client.exists(worker.broker.keys.totals)


def test_what_a_command_waits_for_is_said_on_stderr(
    server: RunningBroker, worker: ScriptedWorker, tmp_path: Path
) -> None:
    """A cluster that is closed for a while is waited for, and stdout still has one JSON object and nothing else."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "reference": "b"}\n', "utf-8")
    cluster, settings = Cluster(worker.broker), Cluster(worker.broker).settings()
    cluster.stop_accepting()
    with subprocess.Popen(
        [sys.executable, "-m", "lemix", "train", str(tmp_path / "rows.jsonl"), "--json"],
        env=os.environ | {"LEMIX_URL": server.url, "LEMIX_CLUSTER": "test"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "cluster_closed"
        cluster.create(settings, MODEL, BYTES_TOKENIZER)
        shown, _ = process.communicate(timeout=20)
    assert json.loads(shown) == {"rows": 1, "examples": 1, "weights_version": None}


def test_an_unreachable_cluster_is_status_1(run: Run) -> None:
    """One sentence with the address."""
    refused = run("flush", "--url", "redis://127.0.0.1:1")
    assert refused.exit_code == 1
    assert "no Redis or Valkey answers there" in refused.stderr
