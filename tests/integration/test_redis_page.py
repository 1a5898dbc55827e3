"""docs/redis.md: every line runs, through `lemix redis` and redis-cli, and its answer speaks to its question."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from clusters import InProcessCluster, in_process_cluster
from fences import ROOT, fences
from lemix import GenerateItem, TrainItem
from lemix.cli.app import build
from lemix_common.broker import Broker, connect
from lemix_common.clock import wait_until
from lemix_common.server import RunningBroker
from lemix_common.settings import ClusterSettings
from lemix_common.store.cluster import Cluster
from lemix_common.store.items import Items
from lemix_stage_worker.inbox import Finished
from tiny_model import write_tiny_llama
from toy_profile import toy_profile

PAGE = ROOT / "docs" / "redis.md"
CLUSTER = "lemix"
"""As the page calls it."""
TOO_HIGH = 9999
"""A token that the model doesn't have."""
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Scene:
    """A cluster in which every question has an answer other than 'nothing'."""

    url: str
    cluster: InProcessCluster
    pending: str
    """An item that node 1 has begun and can't end."""
    client: str
    """Whose it is, and with whom it ends."""


@pytest.fixture(scope="module")
def scene(server: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two nodes of three stages, one trained step, one item that failed, one that is stuck on node 1."""
    model = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)
    settings = ClusterSettings(model=str(model), nodes=2, stages=3, step_examples=2)
    broker = connect(server.url, CLUSTER, patience_s=PATIENCE_S)
    data_dir = tmp_path_factory.mktemp("data")
    with in_process_cluster(broker, settings, data_dir) as (cluster, client):
        for future in [client.submit(TrainItem([3, 4, 5], [6, 7])) for _ in range(2)]:
            future.result(PATIENCE_S)
        submit_unusable(broker, "unusable")
        with stuck(cluster, "worker-5"):  # the last stage of node 1
            asked = GenerateItem([3, 4], 8, ignore_eos=True, deadline_s=3600, while_connected=True)
            served = [client.submit(asked) for _ in range(2)]
            wait_until(lambda: any(f.done() for f in served), what="node 0 answers", timeout_s=PATIENCE_S)
            Cluster(broker).publish_profile(toy_profile(3))
            (waiting,) = [future for future in served if not future.done()]
            yield Scene(server.url, cluster, str(waiting.item_id), str(client.name))
        waiting.result(PATIENCE_S)
    for key in broker.client.scan_iter(match=f"{broker.keys.prefix}*"):
        broker.client.delete(key)
    broker.client.close()


@contextlib.contextmanager
def stuck(cluster: InProcessCluster, slot: str) -> Iterator[None]:
    """A worker that lives and computes nothing for a ``with`` block."""
    worker, go_on = cluster.workers[slot].worker, threading.Event()
    assert worker is not None

    def compute_nothing() -> None:
        go_on.wait(PATIENCE_S)

    worker.inbox.post(Finished(compute_nothing))
    try:
        yield
    finally:
        go_on.set()


def submit_unusable(broker: Broker, item: str) -> None:
    """Have an item fail that a client would have refused."""
    items = Items(broker)
    fields = {"kind": "score", "tokens": 1, "submitted_at": broker.clock.now()}
    items.submit(item, fields, {"prompt": [TOO_HIGH], "reference": [3]})
    wait_until(lambda: items.get(item)["state"] == "failed", what="the item fails", timeout_s=PATIENCE_S)


QUESTIONS = {
    # heading: what its answers must show, by `redis-cli` and by `lemix`
    "1.": (r"\(integer\) 0.*\(integer\) 0.*\(integer\) 0.*\d{13}-0", r"work:1 +1 +1 +[\d.]+ s"),
    "2.": (r"worker-5-\w{6}\n", r"1 +ready +2 +worker-5-\w{6}"),
    "3.": (r"served\n *2\) 0\.1.*1\) 0\.1\n2\) 0\.1\n3\) 0\.1.*1\) 0\.1\n2\) 1", r"version +0\.1 is served"),
    "4.": (r"1\) 0\.\d{6}\n2\) [\d.e-]+\n3\) [\d.]+", r"tax +[\d.]+%"),
    "5.": (r"\(integer\) 1\n.*worker-3-\w{6}:\d+", r"work:1 .* worker-3-\w{6}:\d+ 1"),
    "6.": (r"item\n *3?.*unusable.*index out of range", r"unusable .*index out of range"),
    "7.": (r"1\) 1\n2\) 1\n3\) 1\n.*loss", r"steps +1 planned, 1 committed, 1 published"),
    "8.": (r"coordinator-\w{6}\n\d+", r"leader +coordinator-\w{6}, epoch \d+"),
    "9.": (r"state\n *\d+\) running", r"state +running"),
    "10.": (r"worker-0-\w{6}.*1\) \d{8,}\n2\) \d{8,}", r"worker-0-\w{6} .*\d+ of \d+ MiB"),
    "What": (r"[0-9a-f]{32}\n.*\d{10}\.\d+\n.*[0-9a-f]{32}.*\(integer\) \d{4}", r"deadline_at"),
    "By": (r"1\) 1\n2\) toy\n3\) toy\n4\) roofline\n5\) 3", ""),
    "How": (r"worker-\d-\w{6} memory", r"worker-0-\w{6} .*memory"),
}


def sections() -> dict[str, list[str]]:
    """The lines of each heading's commands."""
    parts = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return {
        part.split("\n")[0]: [
            line for fence in fences(part, "redis.md") if fence.is_command for line in fence.text.splitlines()
        ]
        for part in parts
    }


def test_the_ten_questions_are_there() -> None:
    """Each has at least one line for redis-cli and one for `lemix`."""
    asked = [title for title in sections() if title[0].isdigit()]
    assert [title.split()[0] for title in asked] == [number for number in QUESTIONS if number[0].isdigit()]
    for title in asked:
        kinds = {line.split()[0] for line in sections()[title]}
        assert kinds == {"redis-cli", "lemix"}, title


@pytest.mark.parametrize("number", QUESTIONS)
def test_every_question_has_its_answer(scene: Scene, number: str) -> None:
    """Through `lemix redis`, redis-cli where it is installed, and the page's `lemix` line."""
    (lines,) = [lines for title, lines in sections().items() if title.split()[0] == number]
    by_redis, by_lemix = QUESTIONS[number]
    asked = [words(scene, line)[1:] for line in lines if line.startswith("redis-cli")]
    assert_shows(by_redis, "".join(lemix(scene, "redis", *arguments) for arguments in asked))
    assert_shows(
        by_lemix, "".join(lemix(scene, *words(scene, line)[1:]) for line in lines if line.startswith("lemix"))
    )
    if shutil.which("redis-cli"):
        shown = "".join(redis_cli(scene, *arguments) for arguments in asked)
        assert_shows(by_redis.replace(r"\(integer\) ", r"(?:\(integer\) )?"), shown.replace('"', ""))


def test_the_lines_before_the_questions_work(scene: Scene) -> None:
    """The URL that `lemix url` prints is the broker's."""
    assert lemix(scene, "url") == scene.url.replace("://:", "://default:") + "\n"
    assert lemix(scene, "redis", "PING") == "PONG\n"
    if shutil.which("redis-cli"):
        assert redis_cli(scene, "PING") == "PONG\n"


def words(scene: Scene, line: str) -> list[str]:
    """A line as a shell would split it."""
    worker = scene.cluster.workers["worker-0"].worker
    assert worker is not None
    return [
        word.replace("$ITEM", scene.pending).replace("$WORKER", worker.name).replace("$CLIENT", scene.client)
        for word in shlex.split(line)
    ]


def lemix(scene: Scene, *arguments: str) -> str:
    """What the command prints."""
    environment = {"LEMIX_URL": scene.url, "LEMIX_CLUSTER": CLUSTER, "COLUMNS": "100"}
    ended = CliRunner().invoke(build(), list(arguments), env=environment)
    assert ended.exit_code == 0, (arguments, ended.output)
    return ended.output


def redis_cli(scene: Scene, *arguments: str) -> str:
    """What redis-cli prints."""
    command = ["redis-cli", "--no-auth-warning", "-u", lemix(scene, "url").strip(), "--no-raw", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return ended.stdout


def assert_shows(pattern: str, text: str) -> None:
    """The text has it, over as many lines as it likes."""
    assert re.search(pattern, text, re.DOTALL), text
