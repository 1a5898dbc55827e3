"""``python -m lemix_stage_worker --slot NAME``: composition root of a stage worker process.

One worker a process, since each computes on an accelerator of its own. Emulated ones only wait, so a process may have
many of them: each has its own compute loop, connections and name.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from lemix_common.clock import SystemClock
from lemix_common.errors import BadInput, ClusterError, Fenced, LemixError
from lemix_common.ids import WorkerId
from lemix_common.logs import configure_logs
from lemix_common.metrics import MetricsAddress, metrics_address
from lemix_common.metrics_page import metrics_page
from lemix_common.sign_of_life import SignOfLife
from lemix_common.store.cluster import Cluster
from lemix_common.store.joining import join_cluster
from lemix_common.transports import Identity, open_transport
from lemix_common.transports.place import socket_folders, this_place, usual_addresses
from lemix_stage_worker.device import ENVIRONMENT, choose_device, device_memory_bytes, device_text, prepare
from lemix_stage_worker.emulated.emulation import Emulation
from lemix_stage_worker.emulated.worker import EmulatedWorker
from lemix_stage_worker.heartbeat import Heartbeat
from lemix_stage_worker.inbox import Inbox
from lemix_stage_worker.links import Links
from lemix_stage_worker.memory import keep_freed_memory, peak_rss_bytes
from lemix_stage_worker.metrics import worker_samples
from lemix_stage_worker.model.costs import cut_model
from lemix_stage_worker.model.self_check import check_family
from lemix_stage_worker.model.source import ModelSource, dtype_named, open_model
from lemix_stage_worker.reporter import Reporter
from lemix_stage_worker.worker import Worker

log = structlog.get_logger()
TESTED_FAMILIES = frozenset({"llama", "gpt2"})
"""Their cuts are compared with the whole model by the test suite; others prove themselves at each start."""
SWITCH_S = 0.0005
"""How long a thread may keep Python to itself where several workers share it: none is late by another's turn."""
LONGEST_SOCKET_PATH = 90
"""Bytes, with room for the suffix; the system's own limit is 107."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One of the workers that this process is."""

    slot: str
    """What stays when the process is started again."""
    name: WorkerId
    number: int = 0
    is_alone: bool = True


def main() -> None:
    """Read the environment, connect, register, compute until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m lemix_stage_worker")
    parser.add_argument(
        "--slot",
        action="append",
        help="name that stays when the process is started again (default: this host's); with emulated accelerators it "
        "may be given several times, for a worker each",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help="where to take tensors from other workers: shm:/path, unix:/path, tcp:host:port or redis:name; may be "
        "given several times, neighbours take the best that leads here (default: all that this machine has)",
    )
    parser.add_argument("--alive-file", type=Path, help="touched as long as the worker is well")
    options = parser.parse_args()
    environment = os.environ
    slots = options.slot or [socket.gethostname()]
    seats = [
        Seat(
            slot=slot,
            name=WorkerId(f"{slot}-{uuid.uuid4().hex[:6]}"),
            number=number,
            is_alone=len(slots) == 1,
        )
        for number, slot in enumerate(slots)
    ]
    configure_logs(
        seats[0].name if len(seats) == 1 else f"{slots[0]}-and-{len(slots) - 1}-more",
        level=environment.get("LEMIX_LOG_LEVEL", "info"),
    )
    os.environ.update(ENVIRONMENT)  # torch looks there when it first multiplies
    torch.set_num_threads(1)
    keep_freed_memory()
    url, cluster_name = environment["LEMIX_URL"], environment.get("LEMIX_CLUSTER", "lemix")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run_all(seats, options, url, cluster_name, stop)
    except LemixError as error:
        log.error("worker_ended", reason=str(error))
        sys.exit(2 if isinstance(error, BadInput) else 1)
    finally:
        gc.freeze()  # else Python's exit looks through all of torch's objects: 0.9 s of a core
    log.info("stopped")


def run_all(
    seats: Sequence[Seat], options: argparse.Namespace, url: str, cluster: str, stop: threading.Event
) -> None:
    """Run the worker of each seat; with the first that ends, all do. Raises why it ended."""
    if len(seats) == 1:
        run(seats[0], options, url, cluster, stop)
        return
    sys.setswitchinterval(SWITCH_S)
    failures: list[BaseException] = []

    def run_one(seat: Seat) -> None:
        try:
            run(seat, options, url, cluster, stop)
        except BaseException as error:  # noqa: BLE001 - a thread's end is told by the main one
            failures.append(error)
        finally:
            stop.set()

    threads = [threading.Thread(target=run_one, args=(seat,), name=seat.slot) for seat in seats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def socket_folder(slot: str, name: str) -> Path:
    """Where this process listens: in the data directory, or beside the system's other sockets if that is too long.

    What a killed process of the same slot left is removed.
    """
    preferred, other = socket_folders(Path(os.environ.get("LEMIX_DATA_DIR", ".lemix")))
    folder = preferred if len(str(preferred / name)) <= LONGEST_SOCKET_PATH else other
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in (*folder.glob(f"{slot}-??????.sock"), *folder.glob(f"{slot}-??????.shm")):
        left.unlink(missing_ok=True)
    return folder


def run(seat: Seat, options: argparse.Namespace, url: str, cluster_name: str, stop: threading.Event) -> None:
    """Wait for the cluster, put the worker together and run it."""
    name, slot = seat.name, seat.slot
    broker = join_cluster(url, cluster_name, stop)
    if broker is None:
        return
    cluster = Cluster(broker)
    state = cluster.state()  # before the settings: a change of them between these lines is noticed
    settings = cluster.settings()
    emulated = settings.emulated_profile
    if not (emulated or seat.is_alone):
        raise BadInput(
            f"device = {settings.device}: only emulated accelerators share a process; give one --slot"
        )
    device = prepare(choose_device(settings.device, slot))
    folder = Path(broker.hash(broker.keys.model)["path"])
    source = open_model(folder, dtype=dtype_named(settings.dtype), device=device)
    if source.config.model_type not in TESTED_FAMILIES:
        check_family(source)
    inbox = Inbox()
    transport = open_transport(Identity(name, cluster.secret()), broker=broker)
    links = Links(name, transport, inbox, SystemClock())
    listen = options.listen or usual_addresses(name, socket_folder(slot, name), url)
    if emulated and not options.listen:
        listen = [address for address in listen if address.startswith("unix:")] or listen  # frames are small
    address = links.listen(*listen, place=this_place())
    parts: dict[str, Any] = {
        "name": name,
        "broker": broker,
        "settings": settings,
        "source": source,
        "layers": cut_model(source, settings.stages),
        "links": links,
        "inbox": inbox,
        "reporter": Reporter(name, broker),
    }
    emulation = _emulation(cluster, source) if emulated else None
    worker = EmulatedWorker(**parts, emulation=emulation) if emulation else Worker(**parts)
    about = {
        "slot": slot,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "device": emulation.device_text if emulation else device_text(device),
        "address": address,
        "memory": emulation.profile.memory_bytes if emulation else device_memory_bytes(device),
        "generation": state["generation"],
        "registered_at": f"{broker.clock.now():.6f}",
    }

    def register() -> None:
        try:
            cluster.register(name, about, expiry_s=settings.heartbeat_expiry_s)
        except Fenced:
            log.warning("settings_changed", reason="started again, it reads the new ones")
            stop.set()

    sign_of_life = SignOfLife(options.alive_file)
    heartbeat = Heartbeat(worker, cluster, register, settings.heartbeat_expiry_s, sign_of_life)
    beating = heartbeat.start(stop)
    log.info("worker_registered", address=address, pid=os.getpid(), peak_rss_bytes=peak_rss_bytes())
    with metrics_page(
        lambda: worker_samples(worker),
        process=name,
        role="worker",
        address=_metrics_address(seat.number),
        cluster=Cluster(replace(broker, patience_s=0)),
    ):
        worker.run(stop)
    beating.join(timeout=5.0)


def _emulation(cluster: Cluster, source: ModelSource) -> Emulation:
    """What the cluster's profile makes of its accelerators."""
    profile = cluster.profile()
    if profile is None:
        raise ClusterError(
            "the cluster has no profile to emulate: `lemix up --device emulated:FILE` publishes one"
        )
    return Emulation(profile=profile, vocab_size=source.vocab_size, eos_ids=source.eos_ids)


def _metrics_address(number: int) -> MetricsAddress:
    """As the environment says for the process's first worker, the next ports for its others."""
    address = metrics_address(os.environ)
    return replace(address, port=address.port + number if address.port else 0)


if __name__ == "__main__":
    main()
