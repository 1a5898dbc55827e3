"""What one message from one process to another costs: LeMix's ways beside the bare ones they are built on.

==========  =====================================  ==============================================================
case        `lemix`                                beside
==========  =====================================  ==============================================================
shm_…       a frame over a channel that shares     `raw_unix`: length and bytes over a Unix socket, no more;
            memory, as neighbours on a host do     `memcpy` (4 MB): a copy within a process, no more
unix_…      a frame over a Unix socket             the same
stream_1kb  a work item: added in a Lua call,      `raw_stream`: redis-py's XADD, XREADGROUP, XACK and XDEL on the
            pulled by its group, acknowledged      same server, which keeps every write on disk before it answers
==========  =====================================  ==============================================================

From the moment before sending to the moment the other process has it (see `receivers`). Small frames go from one core
to another, as between workers that compute at the same time: left alone, the system puts both ends on one core whenever
the other has something else to do, and then a bare hop is a switch of context that no pipeline ever sees. With large
frames the copy outweighs that.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import redis

from lemix_benchmarks.receivers import (
    NODE,
    RAW_STREAM,
    SECRET,
    receive_bytes,
    receive_frames,
    receive_raw_work,
    receive_work,
    receiver,
)
from lemix_benchmarks.report import Findings, Plan, Row, Subject, Target, measure, ratio
from lemix_common.broker import Lua, connect
from lemix_common.ids import WorkerId
from lemix_common.messages import RunForward
from lemix_common.server import start_broker
from lemix_common.transports import Identity, open_transport
from lemix_common.wire import TensorBuffer

STREAM: Final = "stream_1kb"
STREAM_BYTES: Final = 2**10
SIZES: Final = {"shm_1kb": 2**10, "shm_4mb": 2**22, "unix_1kb": 2**10, "unix_4mb": 2**22}
MEMCPY_BYTES: Final = 2**20
"""Copying less takes no longer than reading the clock."""
REPETITIONS: Final = {STREAM: 40, "shm_1kb": 200, "shm_4mb": 20, "unix_1kb": 200, "unix_4mb": 20}
LIMITS: Final = {"shm_4mb_over_memcpy": 3.0, "shm_1kb_over_raw_unix": 3.0, "stream_over_raw_stream": 1.5}
FRAME: Final = RunForward(
    node=0,
    stage=1,
    epoch=1,
    iteration=7,
    version="0.0",
    numbers=(3,),
    starts=(40,),
    lengths=(1,),
    tables=(3,),
    wants=(1,),
    slowest_s=0.01,
)

_ADD = Lua("hop", "return redis.call('XADD', K.work(ARGV[1]), '*', 'item', ARGV[2], 'attempt', 1)")


def run(plan: Plan) -> Findings:
    """Measure every case, its subjects in turn."""
    rounds = 7 if plan.quick else 15
    rows: list[Row] = []
    for case, num_bytes in SIZES.items():
        payload = bytearray(random.Random(plan.seed).randbytes(num_bytes))
        with _frame_subjects(case, payload, _repetitions(case, plan)) as subjects:
            rows += measure(subjects, rounds=rounds)
    with _stream_subjects(plan.seed, _repetitions(STREAM, plan)) as subjects:
        rows += measure(subjects, rounds=rounds)
    ratios = {
        f"{case}_over_{peer}": ratio(rows, case, "lemix", peer)
        for case, num_bytes in SIZES.items()
        for peer in _peers(num_bytes)
    }
    ratios["stream_over_raw_stream"] = ratio(rows, STREAM, "lemix", "raw_stream")
    return Findings(
        rounds=rounds,
        threads=1,
        model=None,
        rows=tuple(rows),
        ratios=ratios,
        targets=tuple(Target(name, ratios[name], "<=", limit) for name, limit in LIMITS.items()),
        further={"repetitions": {case: _repetitions(case, plan) for case in REPETITIONS}},
    )


def _peers(num_bytes: int) -> tuple[str, ...]:
    return ("raw_unix", "memcpy") if num_bytes >= MEMCPY_BYTES else ("raw_unix",)


def _repetitions(case: str, plan: Plan) -> int:
    return max(5, REPETITIONS[case] // 4) if plan.quick else REPETITIONS[case]


@contextmanager
def _frame_subjects(case: str, payload: bytearray, repetitions: int) -> Iterator[list[Subject]]:
    with tempfile.TemporaryDirectory(prefix="lemix-hop-") as directory, ExitStack() as stack:
        scheme = case.partition("_")[0]
        sender, other = _two_cores() if len(payload) < MEMCPY_BYTES else (set(), set())
        with _on(other):  # what is started here stays here
            framed = stack.enter_context(_channel(f"{scheme}:{directory}/frames", payload))
            raw = stack.enter_context(_raw_socket(f"{directory}/bytes", payload))
        stack.enter_context(_on(sender))
        copied = bytearray(len(payload))

        def copy() -> float:
            began = time.monotonic()
            copied[:] = payload
            return time.monotonic() - began

        peers = {"raw_unix": raw, "memcpy": copy}
        yield [
            Subject(case, "lemix", framed, repetitions),
            *(Subject(case, peer, peers[peer], repetitions) for peer in _peers(len(payload))),
        ]


@contextmanager
def _stream_subjects(seed: int, repetitions: int) -> Iterator[list[Subject]]:
    payload = random.Random(seed).randbytes(STREAM_BYTES // 2).hex()
    with tempfile.TemporaryDirectory(prefix="lemix-hop-") as directory, ExitStack() as stack:
        server = start_broker(Path(directory))
        stack.callback(server.stop)
        work = stack.enter_context(_work(server.url, payload))
        raw = stack.enter_context(_raw_work(server.url, payload))
        yield [
            Subject(STREAM, "lemix", work, repetitions),
            Subject(STREAM, "raw_stream", raw, repetitions),
        ]


@contextmanager
def _channel(address: str, payload: bytearray) -> Iterator[Callable[[], float]]:
    tensor = TensorBuffer("uint8", (len(payload),), memoryview(payload))
    with receiver(receive_frames, address) as next_arrival:
        channel = open_transport(Identity(WorkerId("sender"), SECRET)).connect(address)
        try:
            yield lambda: _seconds_until(next_arrival, lambda: channel.send(FRAME, [tensor]))
        finally:
            channel.close()


@contextmanager
def _raw_socket(path: str, payload: bytearray) -> Iterator[Callable[[], float]]:
    pieces = [memoryview(len(payload).to_bytes(8, "little")), memoryview(payload)]
    with (
        receiver(receive_bytes, path) as next_arrival,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        connection.connect(path)
        yield lambda: _seconds_until(next_arrival, lambda: connection.sendmsg(pieces))


@contextmanager
def _work(url: str, payload: str) -> Iterator[Callable[[], float]]:
    broker = connect(url)
    with receiver(receive_work, url) as next_arrival, broker.client:
        yield lambda: _seconds_until(next_arrival, lambda: broker.call(_ADD, NODE, payload))


@contextmanager
def _raw_work(url: str, payload: str) -> Iterator[Callable[[], float]]:
    with receiver(receive_raw_work, url) as next_arrival, redis.Redis.from_url(url) as client:
        fields = {"item": payload, "attempt": 1}
        yield lambda: _seconds_until(next_arrival, lambda: client.xadd(RAW_STREAM, fields))


def _two_cores() -> tuple[set[int], set[int]]:
    """A core for each end; none where there are no two, or the system lets nobody choose."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (set(cores[:1]), set(cores[1:2])) if len(cores) > 1 else (set(), set())


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Run on these cores; on any, if it is none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _seconds_until(end: Callable[[], float], act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return end() - began
