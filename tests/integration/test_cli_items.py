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
from lemix_common.store.items import Items

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
    assert generated["ttft_s"] == generated["token_times_s"][0] <= generated["response_s"]
    assert (len(generated["token_times_s"]), scored["response_s"] > 0) == (2, True)
    assert (generated["text"], generated["finish_reason"], generated["weights_version"]) == (
        "ab",
        "length",
        "0.0",
    )


def test_urgency_and_deadline_are_the_items(run: Run, worker: ScriptedWorker) -> None:
    """As the options say."""
    for arguments in (("generate", "ab", "--max-new-tokens", "2"), ("score", "a", "b")):
        answer = json.loads(run(*arguments, "--priority", "-2", "--deadline", "60", "--json").stdout)
        item = Items(worker.broker).get(answer["item"])
        assert item["priority"] == "-2"
        assert float(item["deadline_at"]) - float(item["submitted_at"]) == pytest.approx(60)


def test_what_ends_a_text_is_not_shown(run: Run) -> None:
    """Stops may be repeated; JSON says which it was, and each token's log-probabilities where asked for."""
    at_most = ("--max-new-tokens", "9")
    assert run("generate", "ab né", *at_most, "--stop", "x", "--stop", "é").stdout == "ab n\n"
    assert run("generate", "abc", *at_most, "--stop", "bc", "--include-stop").stdout == "abc\n"
    asked = ("--stop-id", "66", "--logprobs", "1", "--json")
    answer = json.loads(run("generate", "abc", *at_most, *asked).stdout)
    assert (answer["finish_reason"], answer["stop_reason"], answer["text"]) == ("stop", 66, "ab")
    assert [entry["token"] for entry in answer["logprobs"]] == answer["tokens"]


def test_how_to_choose_is_the_items(run: Run, worker: ScriptedWorker) -> None:
    """Every option reaches the worker."""
    options = {
        "temperature": "0.5",
        "top_k": "5",
        "top_p": "0.9",
        "min_p": "0.1",
        "repetition_penalty": "1.2",
        "min_tokens": "1",
        "seed": "3",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    answer = json.loads(run("generate", "a", "--max-new-tokens", "1", *arguments, "--json").stdout)
    item = Items(worker.broker).get(answer["item"])
    assert {name: item[name] for name in options} == options


def test_several_answers_are_shown_in_turn(run: Run) -> None:
    """Each with its number and why it ended; JSON is still one object."""
    arguments = ("generate", "ab", "--max-new-tokens", "2", "--n", "2")
    assert run(*arguments).stdout == "--- 0 (length)\nab\n--- 1 (length)\nab\n"
    answers = json.loads(run(*arguments, "--json").stdout)["answers"]
    assert [answer["text"] for answer in answers] == ["ab", "ab"]


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
        (["generate", "a", "--temperature", "nan"], "temperature nan can't be used"),
        (["generate", "a", "--stop", ""], "a stop string of 0 characters"),
        (["generate", "a", "--stop-id", "256"], "stop id 256 is not in the model's vocabulary"),
        (["generate", "a", "--logprobs", "1"], "--logprobs are shown with --json"),
        (["generate", "a", "--n", "0"], "n 0 can't be used"),
        (["generate", "a", "--over-long", "shorten"], "--over-long shorten: use reject, truncate, split"),
        (["generate", "a", "--on-update", "redo"], "on_update 'redo': use finish or rebuild"),
        (["generate", "a", "--priority", "11"], "priority 11: use a whole number from -10 to 10"),
        (["score", "a", "b", "--deadline", "0"], "deadline_s 0.0: use a number of seconds above 0"),
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
