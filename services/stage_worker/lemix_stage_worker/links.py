"""Connections to other workers: frames out from the compute loop, frames in from one thread a connection."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from torch import Tensor

from lemix_common.clock import Clock
from lemix_common.errors import BadFrame, PeerError, PeerLost
from lemix_common.messages import Frame
from lemix_common.transports import Channel, Listener, Transport
from lemix_stage_worker.inbox import FrameArrived, Inbox, PeerGone
from lemix_stage_worker.tensors import to_buffer, to_tensor

log = structlog.get_logger()


def nothing() -> None:
    """What releasing a tensor does that came from this very process."""


@dataclass
class Links:
    """All of a worker's connections. ``send`` is called by the compute loop only."""

    worker: str
    transport: Transport
    inbox: Inbox
    clock: Clock
    _channels: dict[str, Channel] = field(default_factory=dict)
    _incoming: list[Channel] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listener: Listener | None = None

    def listen(self, address: str) -> str:
        """Accept neighbours from now on; returns the address they can use."""
        self._listener = self.transport.listen(address)
        self._start(self._accept, "accept", self._listener)
        return self._listener.address

    def send(self, worker: str, address: str, frame: Frame, tensors: Sequence[Tensor] = ()) -> bool:
        """Send to a stage's host, which may be this worker; False if the message may be lost.

        On return the tensors' memory is the caller's again, wherever they went.
        """
        if worker == self.worker:
            self.inbox.post(
                FrameArrived(
                    frame, tuple(t.detach().clone() for t in tensors), nothing, worker, self.clock.now()
                )
            )
            return True
        try:
            channel = self._channels.get(address) or self._connect(address)
            channel.send(frame, [to_buffer(tensor) for tensor in tensors])
        except PeerError as error:
            log.warning("send_failed", peer=worker, frame=type(frame).__name__, reason=str(error))
            if dropped := self._channels.pop(address, None):
                dropped.close()
            return False
        return True

    def forget(self, addresses: set[str]) -> None:
        """Close the connections to all but these addresses."""
        for address in self._channels.keys() - addresses:
            self._channels.pop(address).close()

    def close(self) -> None:
        """Close everything and wait for the threads."""
        if self._listener is not None:
            self._listener.close()
        for channel in (*self._channels.values(), *self._incoming):
            channel.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _connect(self, address: str) -> Channel:
        channel = self._channels[address] = self.transport.connect(address)
        return channel

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                channel = listener.accept()
            except PeerLost:
                return
            except PeerError as error:
                log.warning("peer_refused", reason=str(error))
                continue
            self._incoming.append(channel)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._start(self._receive, f"receive-{channel.peer}", channel)

    def _receive(self, channel: Channel) -> None:
        try:
            while True:
                frame, buffers, release = channel.receive()
                tensors = tuple(to_tensor(buffer) for buffer in buffers)
                self.inbox.post(FrameArrived(frame, tensors, release, channel.peer, self.clock.now()))
        except BadFrame as error:
            log.warning("bad_frame", peer=channel.peer, reason=str(error))
        except PeerLost:
            pass
        channel.close()
        self._incoming = [other for other in self._incoming if other is not channel]
        self.inbox.post(PeerGone(channel.peer))

    def _start(self, target: object, name: str, argument: object) -> None:
        thread = threading.Thread(target=target, args=(argument,), name=name, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
