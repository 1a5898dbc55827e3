"""What the bench `decode` does with its peers' processes, on a peer that answers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lemix_benchmarks.decoding import Request
from lemix_benchmarks.peers import Peer, Program, running_peer
from lemix_common.clock import wait_until
from lemix_common.errors import ClusterError

SCRIPTED = """
import json, os, sys, time
print(json.dumps({"ready": "scripted 1"}), flush=True)
for line in sys.stdin:
    group = json.loads(line)
    for number, prompt, count in group:
        if not prompt:
            sys.exit("it has no prompt")
        tokens = [len(group), os.getpid(), *prompt][:count]
        print(json.dumps({"number": number, "tokens": tokens, "times": [time.monotonic()] * count}), flush=True)
"""
"""Its tokens are the size of the group that the request came in, its process, and the prompt."""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A peer's program."""
    path = tmp_path / "scripted.py"
    path.write_text(SCRIPTED)
    return path


def scripted(script: Path, *, is_static: bool = False) -> Program:
    return Program("scripted", (sys.executable, str(script)), 2, is_static=is_static)


@pytest.fixture
def peer(script: Path, tmp_path: Path) -> Iterator[Peer]:
    """Two processes that share the requests."""
    with running_peer(scripted(script), tmp_path / "log") as running:
        yield running


def requests(count: int) -> list[Request]:
    return [Request(number, (number + 2,), 3) for number in range(count)]


def state_of(pid: int) -> str:
    """As the kernel has it: R, S, T for stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_stopped(peer: Peer) -> bool:
    return all(state_of(process.pid) == "T" for process in peer.processes)


def test_requests_go_one_by_one_to_both_processes(peer: Peer) -> None:
    """Each comes back with its own tokens; what is measured ends when the last one was handed out."""
    answered = peer.answer(requests(9), 4)
    assert peer.version == "scripted 1"
    assert {answer.number: answer.tokens[2] for answer in answered.answers} == {n: n + 2 for n in range(9)}
    assert {answer.tokens[0] for answer in answered.answers} == {1}
    assert {answer.tokens[1] for answer in answered.answers} == {process.pid for process in peer.processes}
    last = max(answer.submitted_at for answer in answered.answers)
    assert answered.began <= answered.ended == last


def test_a_single_request_at_a_time_has_a_single_process(peer: Peer) -> None:
    """With two there would be two at a time."""
    answered = peer.answer(requests(3), 1)
    assert len({answer.tokens[1] for answer in answered.answers}) == 1


def test_a_static_peer_gets_batches(script: Path, tmp_path: Path) -> None:
    """Of what its share of the running requests is; the next one when all of a batch is done."""
    with running_peer(scripted(script, is_static=True), tmp_path / "log") as peer:
        answered = peer.answer(requests(10), 8)
    assert sorted(answer.tokens[0] for answer in answered.answers) == [2] * 2 + [4] * 8
    assert answered.ended >= max(answer.times[-1] for answer in answered.answers)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_peer_is_stopped_while_others_are_measured(peer: Peer) -> None:
    """Before its first call, and after each."""
    wait_until(lambda: is_stopped(peer), what="the peer stops", timeout_s=10.0)
    peer.answer(requests(2), 2)
    wait_until(lambda: is_stopped(peer), what="the peer stops again", timeout_s=10.0)


def test_a_peer_that_dies_says_why(peer: Peer) -> None:
    """The last line of what it said, not a time-out."""
    with pytest.raises(ClusterError, match="scripted ended: it has no prompt"):
        peer.answer([Request(0, (), 1), Request(1, (), 1)], 2)


def test_a_program_that_never_is_a_peer_says_why(tmp_path: Path) -> None:
    """An environment without the library, for instance."""
    program = Program("absent", (sys.executable, "-c", "import no_such_library"), 1)
    with (
        pytest.raises(ClusterError, match="absent ended: ModuleNotFoundError"),
        running_peer(program, tmp_path / "log"),
    ):
        pytest.fail("it isn't ready")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_stopped_peers_end_with_a_bench_that_is_killed(script: Path, tmp_path: Path) -> None:
    """Stopped, they can't see that their input has ended: the kernel hangs up on them."""
    bench = (
        "import sys; from pathlib import Path; from lemix_benchmarks.peers import *\n"
        f"with running_peer(Program('scripted', (sys.executable, {str(script)!r}), 2), Path('log')) as peer:\n"
        "    print(*(process.pid for process in peer.processes), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", bench], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdin is not None
    assert killed.stdout is not None
    peers = [int(pid) for pid in killed.stdout.readline().split()]
    try:
        assert len(peers) == 2
        killed.kill()
        killed.wait()
        wait_until(lambda: not any(map(_lives, peers)), what="the peers are gone", timeout_s=10.0)
    finally:
        killed.stdin.close()
        killed.stdout.close()
        for pid in filter(_lives, peers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        return state_of(pid) != "Z"
    except FileNotFoundError:
        return False
