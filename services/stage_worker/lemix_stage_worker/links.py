"""Connections to other workers: frames out from the compute loop, frames in from one thread a connection."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from torch import Tensor

from lemix_common.clock import Clock
from lemix_common.errors import BadFrame, ClusterError, PeerError, PeerLost, PeerUnreachable
from lemix_common.messages import Frame
from lemix_common.transports import (
    NOWHERE,
    Channel,
    Listener,
    Place,
    Reach,
    Transport,
    parse_reach,
    usable_addresses,
)
from lemix_stage_worker.inbox import FrameArrived, Inbox, PeerGone
from lemix_stage_worker.tensors import to_buffer, to_tensor

log = structlog.get_logger()

TRY_AGAIN_S = 60.0
"""After this long, an address that didn't lead to a peer may again."""


def nothing() -> None:
    """What releasing a tensor does that came from this very process."""


@dataclass
class Links:
    """All of a worker's connections. ``send`` is called by the compute loop only."""

    worker: str
    transport: Transport
    inbox: Inbox
    clock: Clock
    reach: Reach = field(default_factory=Reach)
    """Where this worker listens, once it does."""
    _channels: dict[str, Channel] = field(default_factory=dict)
    """By their peers' reach."""
    _taken: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By their peers' reach: the peer, and the address that led there."""
    _incoming: list[Channel] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listeners: list[Listener] = field(default_factory=list)
    _unreachable: dict[str, float] = field(default_factory=dict)
    """Addresses that didn't lead to their worker while another one did, and when."""

    def listen(self, *addresses: str, place: Place = NOWHERE) -> str:
        """Accept neighbours at these addresses from now on; returns what they need to know, a `Reach` as text.

        Of several addresses some may be impossible here; one must do.
        """
        for address in addresses:
            try:
                listener = self.transport.listen(address)
            except ClusterError as error:
                if address == addresses[-1] and not self._listeners:
                    raise
                log.warning("not_listening", address=address, reason=str(error))
                continue
            self._listeners.append(listener)
            self._start(self._accept, "accept", listener)
        self.reach = Reach(tuple(listener.address for listener in self._listeners), place)
        return str(self.reach)

    def send(self, worker: str, reach: str, frame: Frame, tensors: Sequence[Tensor] = ()) -> bool:
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
            channel = self._channels.get(reach) or self._connect(reach)
            channel.send(frame, [to_buffer(tensor) for tensor in tensors])
        except PeerError as error:
            log.warning("send_failed", peer=worker, frame=type(frame).__name__, reason=str(error))
            if dropped := self._channels.pop(reach, None):
                dropped.close()
            return False
        return True

    @property
    def ways(self) -> dict[str, str]:
        """How what is sent to each peer travels: ``shm``, ``unix``, ``tcp``, ``redis`` … May be asked by any thread."""
        connected = self._channels.copy()
        return {
            peer: address.partition(":")[0]
            for reach, (peer, address) in self._taken.copy().items()
            if reach in connected
        }

    def forget(self, reaches: set[str]) -> None:
        """Close the connections to all but the workers that are reached so."""
        for reach in self._channels.keys() - reaches:
            self._channels.pop(reach).close()
        self._taken = {reach: way for reach, way in self._taken.items() if reach in reaches}

    def close(self) -> None:
        """Close everything and wait for the threads."""
        for listener in self._listeners:
            listener.close()
        for channel in (*self._channels.values(), *self._incoming):
            channel.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _connect(self, reach: str) -> Channel:
        """Connect by the best way that leads there."""
        ways = self._ways(reach)
        for tried, way in enumerate(ways):
            try:
                channel = self._channels[reach] = self.transport.connect(way)
            except PeerUnreachable as error:
                log.debug("no_way", address=way, reason=str(error))
                continue
            self._unreachable |= dict.fromkeys(ways[:tried], self.clock.now())
            self._taken[reach] = (channel.peer, way)
            log.info("connected", peer=channel.peer, address=way)
            return channel
        raise PeerUnreachable(f"nobody answers at {' or '.join(ways)}")

    def _ways(self, reach: str) -> list[str]:
        """The peer's addresses, the best first; those that lately led nowhere last."""
        since = self.clock.now() - TRY_AGAIN_S
        self._unreachable = {way: at for way, at in self._unreachable.items() if at > since}
        return sorted(usable_addresses(self.reach, parse_reach(reach)), key=self._unreachable.__contains__)

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
