"""The peers of `decode`: programs in processes of their own that answer requests, a JSON line for each.

A peer's process says when it is ready and with which version of what; then each line it is given is a list of requests
to be run together, and each line it gives is an answer, with the moments at which its tokens were there. While somebody
else is measured a peer is stopped (SIGSTOP), whatever it does while it waits.

Each peer is a process group with all that it starts. It ends when its input does. If the bench is killed while a peer
is stopped, the kernel hangs up on the group, which ends it too: so it must stay in the bench's session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from lemix_benchmarks.decoding import Answer, Answered, Request, by_new_tokens
from lemix_common.children import last_reason
from lemix_common.errors import ClusterError

_START_TIMEOUT_S: Final = 300.0
_TIMEOUT_S: Final = 600.0
_END_TIMEOUT_S: Final = 45.0
_GONE: Final = None


@dataclass(frozen=True, slots=True)
class Program:
    """How a peer is run."""

    name: str
    command: tuple[str, ...]
    replicas: int
    """That share the requests: two where one has a single computing process, ours being two."""
    is_static: bool = False
    """It takes a batch, and nothing more until the batch is done."""


def generate(folder: Path, device: str = "cpu") -> Program:
    """transformers' `generate`, on batches of answers of like length."""
    return Program("generate", _of_ours("generate_peer", folder, device), 2, is_static=True)


def continuous_batching(folder: Path, device: str = "cpu", *, running: int) -> Program:
    """transformers' continuous batching, with room for so many requests in each process."""
    return Program("continuous_batching", _of_ours("continuous_peer", folder, running, device), 2)


def vllm_cpu(folder: Path, python: str) -> Program:
    """vLLM as a pipeline of two stages, run by the Python of its own environment."""
    script = Path(__file__).with_name("vllm_peer.py")
    return Program("vllm_cpu", (python, "-I", str(script), str(folder)), 1)  # -I: our folder isn't its path


def _of_ours(module: str, *arguments: object) -> tuple[str, ...]:
    return sys.executable, "-m", f"lemix_benchmarks.{module}", *map(str, arguments)


@dataclass(eq=False)
class Peer:
    """A running peer, stopped but for the time of its calls."""

    program: Program
    processes: Sequence[subprocess.Popen[str]]
    log: Path
    version: str = ""
    """Of the library that answers, as it says itself."""
    heard: SimpleQueue[tuple[int, Any]] = field(default_factory=SimpleQueue)
    """Replicas and what they said."""
    _listeners: list[Thread] = field(default_factory=list)

    def answer(self, requests: Sequence[Request], concurrency: int) -> Answered:
        """Keep so many requests running as long as there are more.

        What is measured is the time until the last request was handed out; of a static peer, which has fewer and fewer
        running in every batch, the whole time.
        """
        self._signal(signal.SIGCONT)
        try:
            return self._answer(requests, concurrency)
        finally:
            self._signal(signal.SIGSTOP)

    def _answer(self, requests: Sequence[Request], concurrency: int) -> Answered:
        replicas = range(min(len(self.processes), concurrency))
        each, is_static = concurrency // len(replicas), self.program.is_static
        groups = iter(by_new_tokens(requests, each) if is_static else [(request,) for request in requests])
        submitted_at: dict[int, float] = {}
        unanswered: Counter[int] = Counter()

        def give(replica: int) -> None:
            if group := next(groups, ()):
                unanswered[replica] += len(group)
                submitted_at.update(dict.fromkeys((request.number for request in group), time.monotonic()))
                self._say(replica, group)

        began = time.monotonic()
        for replica in [*replicas] * (1 if is_static else each):
            give(replica)
        answers: list[Answer] = []
        while len(answers) < len(requests):
            replica, said = self._next(_TIMEOUT_S)
            number = said["number"]
            answers.append(Answer(number, submitted_at[number], tuple(said["tokens"]), tuple(said["times"])))
            unanswered[replica] -= 1
            if not is_static or not unanswered[replica]:
                give(replica)
        ended = time.monotonic() if is_static else max(submitted_at.values())
        return Answered(tuple(answers), began, ended)

    def _say(self, replica: int, group: Sequence[Request]) -> None:
        process = self.processes[replica]
        assert process.stdin is not None
        lines = [[request.number, request.prompt, request.new_tokens] for request in group]
        try:
            process.stdin.write(json.dumps(lines) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _next(self, timeout_s: float) -> tuple[int, Mapping[str, Any]]:
        """What one of the replicas says next; `ClusterError` if one died or none says anything."""
        try:
            replica, said = self.heard.get(timeout=timeout_s)
        except Empty:
            raise ClusterError(f"{self.program.name}: no answer within {timeout_s:g} s") from None
        if said is _GONE:
            raise self._died()
        return replica, said

    def _died(self) -> ClusterError:
        return ClusterError(f"{self.program.name} ended: {last_reason(self.log)}")

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # it ended by itself, which the next answer says
                os.killpg(process.pid, number)

    def listen(self) -> None:
        """Hear what the replicas say, and wait until all are ready."""
        for replica, process in enumerate(self.processes):
            self._listeners.append(Thread(target=self._hear, args=(replica, process), daemon=True))
            self._listeners[-1].start()
        for _ in self.processes:
            _, said = self._next(_START_TIMEOUT_S)
            self.version = str(said["ready"])
        self._signal(signal.SIGSTOP)

    def _hear(self, replica: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.heard.put((replica, json.loads(line)))
        self.heard.put((replica, _GONE))

    def end(self) -> None:
        """Close the input, and kill what that doesn't end."""
        self._signal(signal.SIGCONT)
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for listener in self._listeners:
            listener.join()


@contextmanager
def running_peer(program: Program, log: Path) -> Iterator[Peer]:
    """A peer for the length of a ``with`` block; what it says beside its answers goes to ``log``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as said:
        processes = [
            subprocess.Popen(
                program.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=environment,
                process_group=0,
            )
            for _ in range(program.replicas)
        ]
    peer = Peer(program, tuple(processes), log)
    try:
        peer.listen()
        yield peer
    finally:
        peer.end()
