"""How long a stage's output takes to the next stage: to another process of this machine, by the way workers take."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from lemix_common.errors import ClusterError, PeerLost
from lemix_common.ids import WorkerId
from lemix_common.messages import RunForward
from lemix_common.transports import Identity, open_transport

if TYPE_CHECKING:  # what receives starts without torch
    from lemix_stage_worker.model.source import ModelSource

_SECRET: Final = b"profile"
_TOKENS: Final = (1, 4, 16, 64, 128, 256, 512, 1024)
_REPETITIONS: Final = 5
_FRAME: Final = RunForward(
    node=0,
    stage=1,
    epoch=1,
    iteration=1,
    version="0.0",
    numbers=(1,),
    starts=(0,),
    lengths=(1,),
    tables=(1,),
    wants=(1,),
    slowest_s=0.0,
)


def measure_hops(source: ModelSource, *, rounds: int) -> list[dict[str, Any]]:
    """By number of tokens, the median of the seconds from sending to having it (both processes' clock is one)."""
    import torch

    from lemix_stage_worker.tensors import to_buffer

    size = int(source.config.hidden_size)
    messages = {
        tokens: torch.zeros((1, tokens, size), dtype=source.dtype, device=source.device) for tokens in _TOKENS
    }
    taken: dict[int, list[float]] = {tokens: [] for tokens in _TOKENS}
    with (
        tempfile.TemporaryDirectory(prefix="lemix-profile-") as folder,
        _receiver(f"shm:{folder}/hop") as next_arrival,
    ):
        channel = open_transport(Identity(WorkerId("sender"), _SECRET)).connect(f"shm:{folder}/hop")
        try:
            for _ in range(rounds * _REPETITIONS):
                for tokens, hidden_1TD in messages.items():
                    began = time.monotonic()
                    channel.send(_FRAME, [to_buffer(hidden_1TD)])
                    taken[tokens].append(next_arrival() - began)
        finally:
            channel.close()
    return [
        {"tokens": tokens, "seconds": median(times[_REPETITIONS:] or times)}
        for tokens, times in taken.items()
    ]


@contextmanager
def _receiver(address: str) -> Iterator[Callable[[], float]]:
    """A process that listens there; yielded as a call that waits for its next message and returns the time of it."""
    command = [sys.executable, "-m", __spec__.name, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def next_arrival() -> float:
            line = lines.readline()
            if not line:
                raise ClusterError(f"the process that receives at {address} has ended")
            return float(line)

        try:
            next_arrival()
            yield next_arrival
        finally:
            process.kill()


def receive(address: str) -> None:
    """Say when listening, then when each message is here; end with the sender."""
    listener = open_transport(Identity(WorkerId("receiver"), _SECRET)).listen(address)
    _say(time.monotonic())
    channel = listener.accept()
    with suppress(PeerLost):
        while True:
            delivery = channel.receive()
            at = time.monotonic()
            delivery.release()
            _say(at)


def _say(at: float) -> None:
    sys.stdout.write(f"{at!r}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    receive(sys.argv[1])
