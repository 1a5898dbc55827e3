"""The seam between a worker and whatever carries its tensors to a neighbour.

A `Transport` listens and connects, a `Channel` sends and receives frames, and both ends are plain blocking
calls from plain threads: a worker has one thread that accepts, one that receives on each channel, and any
number that send. What every transport promises, and one conformance suite checks:

* both ends proved that they hold the cluster's secret before a channel exists, and each knows the other's id;
* frames arrive whole and in the order they were sent; one that breaks a rule of the wire is a `BadFrame`;
* a channel that ended, for whatever reason, raises `PeerLost` from then on and never blocks;
* a peer that takes nothing for `Timeouts.send_s` is lost, so a worker must keep on receiving: two neighbours
  that only sent to each other would wait for each other.

Peers are authenticated, what they say is not encrypted: sockets belong on a private network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lemix_common.errors import SettingsError
from lemix_common.ids import WorkerId
from lemix_common.messages import Frame
from lemix_common.wire import TensorBuffer


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is, and the secret that shows which cluster it belongs to."""

    worker: WorkerId
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not self.secret:
            raise SettingsError("the cluster's secret is empty: any process could join")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a peer may take."""

    hello_s: float = 5.0  # to answer at all, and then to prove itself
    send_s: float = 10.0  # to take any byte of what is sent to it; noticed after half of it at the earliest


class Delivery(NamedTuple):
    """A frame that arrived, with its tensors.

    Call ``release`` when the tensors were used or copied: their memory then holds a later frame. It may be
    called from any thread and more than once. Tensors that are never released stay as they are and are
    garbage collected.
    """

    frame: Frame
    tensors: tuple[TensorBuffer, ...]
    release: Callable[[], None]


class Channel(Protocol):
    """Frames to and from one authenticated peer."""

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""

    def send(self, frame: Frame, tensors: Sequence[TensorBuffer] = ()) -> None:
        """Send a frame, from any thread; on return the tensors' memory is the caller's again.

        A frame that breaks a rule of the wire is a `BadFrame`, before a byte of it was sent.
        """

    def receive(self) -> Delivery:
        """Wait for the next frame; a `BadFrame` from the peer ends the channel."""

    def close(self) -> None:
        """End the channel and wake who waits on it; frames on their way may be lost. May be called twice."""


class Listener(Protocol):
    """An address that peers connect to."""

    @property
    def address(self) -> str:
        """Where it really listens (port 0 was resolved)."""

    def accept(self) -> Channel:
        """Wait for the next peer.

        A connection that isn't a peer's raises `PeerRefused` or `BadFrame` once: log it and accept again.
        `PeerLost` means that this listener was closed.
        """

    def close(self) -> None:
        """Stop listening and wake who waits in `accept`; accepted channels live on. May be called twice."""


class Transport(Protocol):
    """One way to carry frames."""

    def listen(self, address: str) -> Listener:
        """Listen there; an address that can't be had is a `ClusterError`."""

    def connect(self, address: str) -> Channel:
        """The channel to who listens there: `PeerLost` if nobody does, `PeerRefused` if it isn't a peer."""
