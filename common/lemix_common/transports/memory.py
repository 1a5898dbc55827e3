"""The in-process twin: the same frames, checks and errors as over sockets, with queues for wires.

Frames are encoded and decoded as on every wire and tensors are copied once, so that a program that works over
memory doesn't lean on shared objects. A pipe holds about as many bytes as a socket does: who doesn't receive
stalls its peer.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Sequence
from threading import Condition, Lock
from typing import Final, NamedTuple

from lemix_common.errors import ClusterError, PeerLost, PeerRefused, PeerUnreachable, SettingsError
from lemix_common.ids import WorkerId
from lemix_common.messages import Frame
from lemix_common.transports.addresses import MemoryAddress, parse_address
from lemix_common.transports.arrivals import Arrivals
from lemix_common.transports.base import Delivery, Identity, Timeouts
from lemix_common.transports.pool import BufferPool, Lease
from lemix_common.wire import FRAMES, PRELUDE_BYTES, TensorBuffer

_PIPE_BYTES: Final = 2**18

_listeners: dict[str, MemoryListener] = {}
_listeners_lock = Lock()  # names are the process's, as ports are the host's


class MemoryTransport:
    """Channels within this process."""

    def __init__(self, identity: Identity, timeouts: Timeouts, pool: BufferPool) -> None:
        self._identity = identity
        self._timeouts = timeouts
        self._pool = pool

    def listen(self, address: str) -> MemoryListener:
        """Take the name."""
        name = _name(address)
        with _listeners_lock:
            if name in _listeners:
                raise ClusterError(f"can't listen at {address}: it is taken")
            _listeners[name] = listener = MemoryListener(name, self._identity)
        return listener

    def connect(self, address: str) -> MemoryChannel:
        """The channel to who listens there."""
        with _listeners_lock:
            listener = _listeners.get(_name(address))
        if listener is None:
            raise PeerUnreachable(f"nobody answers at {address}")
        there, back = _Pipe(self._timeouts.send_s), _Pipe(self._timeouts.send_s)
        listener.meet(self._identity, MemoryChannel(self._identity.worker, there, back, self._pool))
        return MemoryChannel(listener.worker, back, there, self._pool)


class MemoryListener:
    """A name, and the queue of who connected to it."""

    def __init__(self, name: str, identity: Identity) -> None:
        self._name = name
        self._identity = identity
        self._arrivals: Arrivals[MemoryChannel] = Arrivals(self.address)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"memory:{self._name}"

    @property
    def worker(self) -> WorkerId:
        """Who listens."""
        return self._identity.worker

    def meet(self, stranger: Identity, channel: MemoryChannel) -> None:
        """Let the stranger be accepted, if it holds the same secret."""
        if hmac.compare_digest(stranger.secret, self._identity.secret):
            self._arrivals.add(channel)
            return
        refusal = f"worker {stranger.worker!r:.80} doesn't hold this cluster's secret"
        self._arrivals.add(PeerRefused(refusal))
        raise PeerRefused(refusal)

    def accept(self) -> MemoryChannel:
        """Wait for the next peer."""
        return self._arrivals.accept()

    def close(self) -> None:
        """Give the name back and drop who wasn't accepted."""
        with _listeners_lock:
            if _listeners.get(self._name) is self:
                del _listeners[self._name]
        self._arrivals.close()


class MemoryChannel:
    """One end of two pipes."""

    def __init__(self, peer: WorkerId, incoming: _Pipe, outgoing: _Pipe, pool: BufferPool) -> None:
        self._peer = peer
        self._incoming = incoming
        self._outgoing = outgoing
        self._pool = pool

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._peer

    def send(self, frame: Frame, tensors: Sequence[TensorBuffer] = ()) -> None:
        """Copy the frame into the peer's pipe."""
        head, *pieces = FRAMES.encode(frame, tensors)
        payload = self._pool.take(sum(piece.nbytes for piece in pieces))
        start = 0
        for piece in pieces:
            payload.view[start : start + piece.nbytes] = piece
            start += piece.nbytes
        if not self._outgoing.put(_Parcel(head, payload)):
            self._incoming.end(discard=True)
            raise PeerLost(f"{self._peer} ended the connection, or takes nothing any more")

    def receive(self) -> Delivery:
        """Wait for the next frame."""
        parcel = self._incoming.get()
        if parcel is None:
            raise PeerLost(f"{self._peer} ended the connection, or it was closed here")
        head, (payload, release) = parcel
        prelude = FRAMES.read_prelude(head[:PRELUDE_BYTES])
        header = FRAMES.read_header(prelude, head[PRELUDE_BYTES:])
        return Delivery(header.message, header.tensors(payload), release)

    def close(self) -> None:
        """End both pipes."""
        self._outgoing.end()
        self._incoming.end(discard=True)


class _Parcel(NamedTuple):
    """A frame on its way."""

    head: memoryview
    payload: Lease


class _Pipe:
    """Frames one way, in order and bounded; a frame of any size enters a pipe that isn't full."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._parcels: deque[_Parcel] = deque()
        self._num_bytes = 0
        self._is_ended = False
        self._changed = Condition()

    def put(self, parcel: _Parcel) -> bool:
        """Whether the parcel was taken in time; if not, the pipe has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or self._num_bytes < _PIPE_BYTES, self._timeout_s)
            if self._is_ended or self._num_bytes >= _PIPE_BYTES:
                self._is_ended = True
                self._changed.notify_all()
                return False
            self._parcels.append(parcel)
            self._num_bytes += parcel.head.nbytes + parcel.payload.view.nbytes
            self._changed.notify_all()
            return True

    def get(self) -> _Parcel | None:
        """The next parcel; none when the pipe has ended and is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or self._parcels)
            if not self._parcels:
                return None
            parcel = self._parcels.popleft()
            self._num_bytes -= parcel.head.nbytes + parcel.payload.view.nbytes
            self._changed.notify_all()
            return parcel

    def end(self, *, discard: bool = False) -> None:
        """Take nothing more; what is inside can still be had, unless it is discarded."""
        with self._changed:
            self._is_ended = True
            if discard:
                self._parcels.clear()
            self._changed.notify_all()


def _name(address: str) -> str:
    parsed = parse_address(address)
    if not isinstance(parsed, MemoryAddress):
        raise SettingsError(f"{address} is no name in memory")
    return parsed.name
